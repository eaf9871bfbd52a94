"""Puts the application together: what `serve run serve_config.yaml` calls."""

from typing import Any

from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from cluster.placement import REPLICA_CPUS, engine_bundles
from cluster.processes import HEALTH_CHECK_PERIOD_S, HEALTH_CHECK_TIMEOUT_S
from deployments.config import AppConfig
from deployments.engine_config import EngineConfig
from deployments.serve.coordinator import Coordinator
from deployments.serve.engines import EngineReplica
from deployments.serve.ingress import Ingress
from deployments.serve.retriever import RetrieverReplica
from deployments.serve.routing import LeaseRouter

# The deployments that only pass things on hold as many requests as come; the engines decide how many run.
_UNBOUNDED = 10_000
_HEALTH = {"health_check_period_s": HEALTH_CHECK_PERIOD_S, "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S}
_LOOK_BACK_S = 15.0  # averages over longer only delay; replicas report every 10 s


def build(config: AppConfig) -> Application:
    """The Ray Serve application of ``config`` (the `args` in the config file)."""
    target = _engine("Target", config.target, drafts=config.colocated)
    drafter = target if config.colocated else _engine("Drafter", config.drafter, drafts=True)
    retriever = RetrieverReplica.options(
        name="Retriever",
        max_ongoing_requests=_UNBOUNDED,
        ray_actor_options={"num_cpus": config.retriever.num_cpus, "num_gpus": config.retriever.num_gpus},
        **_HEALTH,
    ).bind(config.retriever, config.files, config.target.model)
    # A stream goes through these two: they wait for its end as long as the engines do.
    drain_timeout_s = max(config.target.drain_timeout_s, config.drafting_engine.drain_timeout_s)
    light = _HEALTH | {
        "max_ongoing_requests": _UNBOUNDED,
        "ray_actor_options": {"num_cpus": 0},
        "graceful_shutdown_timeout_s": drain_timeout_s,
    }
    coordinator = Coordinator.options(name="Coordinator", **light).bind(config, target, drafter, retriever)
    # The proxy's router of Serve remembers a name for ever that any client may send in a header.
    router = RequestRouterConfig(request_router_class=LeaseRouter)
    ingress: Application = Ingress.options(name="Ingress", request_router_config=router, **light).bind(
        config, coordinator
    )
    return ingress


def _engine(name: str, config: EngineConfig, *, drafts: bool) -> Application:
    bundles = engine_bundles(num_cpus=config.num_cpus, num_gpus=config.num_gpus, num_ranks=config.tensor_parallel)
    engine: Application = EngineReplica.options(
        name=name,
        max_ongoing_requests=config.max_sequences,
        max_queued_requests=config.max_queued,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        placement_group_bundles=bundles,
        placement_group_strategy="STRICT_PACK",
        **_HEALTH,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        request_router_config=RequestRouterConfig(request_router_class=LeaseRouter),
        **_replicas(config),
    ).bind(config, drafts)
    return engine


def _replicas(config: EngineConfig) -> dict[str, Any]:
    wanted = config.replicas
    if wanted.min == wanted.max:
        return {"num_replicas": wanted.min}
    policy = AutoscalingPolicy(
        policy_function="cluster.scaling:LeasePolicy", policy_kwargs={"target_kv_share": wanted.target_kv_share}
    )
    scaling = AutoscalingConfig(
        min_replicas=wanted.min,
        max_replicas=wanted.max,
        target_ongoing_requests=wanted.target_leases or 0.75 * config.max_sequences,
        upscale_delay_s=wanted.upscale_delay_s,
        downscale_delay_s=wanted.downscale_delay_s,
        look_back_period_s=_LOOK_BACK_S,
        policy=policy,
    )
    return {"autoscaling_config": scaling}
