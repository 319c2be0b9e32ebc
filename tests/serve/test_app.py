"""How many engines there are, and how wide the door is."""

from __future__ import annotations

import pytest

from cascade.errors import ConfigError
from serve.arguments import checked
from serve.ingress import EngineReplica


def test_the_door_is_as_wide_as_the_engines_that_there_may_be() -> None:
    fixed = checked({"replicas": "2", "rows": "8", "waiting": "4"})
    assert (fixed.room, fixed.most_room) == (12, 24)
    assert EngineReplica.options(**fixed.scaling).num_replicas == 2
    more = checked({"replicas": "2", "max_replicas": "5", "rows": "8", "waiting": "4"})
    assert (more.room, more.most_room) == (12, 60)
    bounds = EngineReplica.options(**more.scaling)._deployment_config.autoscaling_config
    assert (bounds.min_replicas, bounds.max_replicas, bounds.target_ongoing_requests) == (2, 5, 6)
    with pytest.raises(ConfigError, match="max_replicas"):
        _ = checked({"replicas": "2", "max_replicas": "1"}).scaling
