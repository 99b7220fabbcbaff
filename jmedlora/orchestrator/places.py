"""Places of worker groups that nobody directs any more."""

from __future__ import annotations

import ray
from ray._private.state import state
from ray._raylet import ActorID, PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group


def free_abandoned_places() -> None:
    """Gives back what worker groups of this sweep had reserved whose controller was killed.

    Ray itself would keep that reserved until the sweep's end: Ray Train's own cleaner asks the dashboard, which is not always
    there, and the trial that goes on would wait for its own place.
    """
    own = ray.get_runtime_context().get_job_id()
    for table in state._connect_and_get_accessor().get_placement_group_table():
        place = PlacementGroupTableData.FromString(table)
        by_actor = place.creator_actor_id and not ActorID(place.creator_actor_id).is_nil()
        is_abandoned = by_actor and place.creator_actor_dead and place.state != PlacementGroupTableData.REMOVED
        if is_abandoned and place.creator_job_id.hex() == own:
            remove_placement_group(PlacementGroup(PlacementGroupID(place.placement_group_id)))
