"""Puts the application together: what `serve run serve_config.yaml` calls."""

from ray import serve
from ray.serve import Application

from cluster.placement import REPLICA_CPUS, engine_bundles
from deployments.config import AppConfig, EngineConfig
from deployments.coordinator import Coordinator
from deployments.engines import EngineReplica
from deployments.ingress import Ingress
from deployments.retriever import RetrieverReplica

# The deployments that only pass things on hold as many requests as come; the engines decide how many run.
_UNBOUNDED = 10_000


def build(config: AppConfig) -> Application:
    """The Ray Serve application of ``config`` (the `args` in the config file)."""
    target = _engine("Target", config.target)
    drafter = target if config.colocated else _engine("Drafter", config.drafter)
    retriever = RetrieverReplica.options(
        name="Retriever",
        max_ongoing_requests=_UNBOUNDED,
        ray_actor_options={"num_cpus": config.retriever.num_cpus, "num_gpus": config.retriever.num_gpus},
    ).bind(config.retriever, config.target.model)
    coordinator = _light(Coordinator, "Coordinator").bind(config, target, drafter, retriever)
    return _light(Ingress, "Ingress").bind(coordinator, config.model_name)


def _light(deployment: serve.Deployment, name: str) -> serve.Deployment:
    return deployment.options(name=name, max_ongoing_requests=_UNBOUNDED, ray_actor_options={"num_cpus": 0})


def _engine(name: str, config: EngineConfig) -> Application:
    return EngineReplica.options(
        name=name,
        max_ongoing_requests=config.max_sequences,
        max_queued_requests=config.max_queued,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        placement_group_bundles=engine_bundles(num_cpus=config.num_cpus, num_gpus=config.num_gpus),
        placement_group_strategy="STRICT_PACK",
    ).bind(config)
