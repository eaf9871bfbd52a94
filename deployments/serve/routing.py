"""The router of leases: Serve's, without the finished requests that it would keep for ever, and around what hangs."""

import random

from ray.serve._private.request_router import PendingRequest
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve._private.request_router.replica_wrapper import RunningReplica

from deployments.serve.avoided import is_avoided

_MAX_NAMES = 10_000  # of documents that no replica was known to have read when their requests came


class LeaseRouter(PowerOfTwoChoicesRequestRouter):
    """Prefers replicas that have read a document (Serve's "multiplexed model"), and takes the less busy of two.

    Replicas that this process avoids are taken only where there are no others.

    Ray 2.60 leaves a finished request in its lists until another request about the same document comes. Models are few,
    but documents are many, and each of these requests holds a whole prompt.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        chosen = await super().choose_replicas(candidate_replicas, pending_request)
        well = [[replica for replica in rank if not is_avoided(replica.replica_id.unique_id)] for rank in chosen]
        if any(well) or not any(chosen):
            return well
        others = [replica for replica in candidate_replicas if not is_avoided(replica.replica_id.unique_id)]
        return [random.sample(others, min(2, len(others)))] if others else chosen

    def _remove_pending_request_from_indices(self, pending_request: PendingRequest) -> None:
        super()._remove_pending_request_from_indices(pending_request)
        self._get_pending_request_matching_multiplexed_model_id(pending_request.metadata)  # drops those that are done
        waiting = self._pending_requests_to_fulfill
        while waiting and waiting[0].future.done():
            waiting.popleft()
        if len(self._multiplexed_model_id_fallback_match) > _MAX_NAMES:
            self._multiplexed_model_id_fallback_match.clear()
