"""What Ray and Serve do with processes: how soon one that does not answer is replaced, and how much one remembers."""

from __future__ import annotations

# Three checks in a row must fail, each after its timeout.
HEALTH_CHECK_PERIOD_S = 2.0
HEALTH_CHECK_TIMEOUT_S = 2.0

# For the process that starts Ray and Serve's controller; the others inherit it.
ENVIRONMENT = {
    # By default Serve stops a replica that failed its checks as gracefully as one that is scaled down, and waits for
    # streams that cannot end.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # Of the HTTP proxies; three must fail, too. By default a proxy that hangs is replaced after a minute. Its streams
    # cannot tell their clients anything until then, so it is checked more often than replicas are.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "1.5",
    # What failed its checks is asked to leave all the same, and killed after that time: 5 s by default.
    "RAY_SERVE_PROXY_GRACEFUL_SHUTDOWN_TIMEOUT_S": "1",
    # Ray asks a process to end, and kills it so much later; one that is stopped keeps its connections until then. By
    # default that takes five seconds.
    "RAY_kill_worker_timeout_milliseconds": "1000",
    # Behind Ray's own daemons, as by default (15), but not so far behind. Work that stands behind all others then has
    # 1/110 of a busy core and not 1/13, and the service is not put off by every other program of its machine.
    "RAY_worker_niceness": "5",
    # By default glibc gives each of Ray's threads a heap of its own, which fragments as prompts come and go.
    "MALLOC_ARENA_MAX": "2",
    # Ray remembers the latest 100,000 calls, and of a million more that it forgot them.
    "RAY_task_events_max_num_task_in_gcs": "1000",
    "RAY_task_events_max_dropped_task_attempts_tracked_per_job_in_gcs": "1000",
}
