"""How many replicas there should be: by the tokens that wait, not by the number of requests.

A request may be a word or a book, so routers tell Serve's autoscaler what they have to do as
replicas are compared by it (`replica_choice.weight`), in shares of what one replica should have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from tensorray.cluster.config import EngineConfig
from tensorray.cluster.replica_choice import SEQUENCE_TOKENS

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

#: What routers call their share of a replica's work.
METRIC = "replicas_worth"


def target_tokens(config: EngineConfig) -> int:
    """What one replica should have to do, in prompt tokens."""
    given = config.autoscaling_config.get("target_queued_tokens")
    return int(given or SEQUENCE_TOKENS * max(1, config.max_num_seqs * 3 // 4))


def replicas_wanted(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Serve's policy: as many replicas as there is work for; its delays and limits come on top."""
    told = (context.aggregated_metrics or {}).get(METRIC, {})
    if not told:  # nobody has said anything yet
        return context.target_num_replicas, {}
    # Those that have not said anything yet may be about to take their share.
    return sum(told.values()), {}


def serve_settings(config: EngineConfig) -> AutoscalingConfig | None:
    """What Serve is told; None where the number of replicas is fixed.

    Raises pydantic's ValidationError for what Serve does not know.
    """
    if not config.autoscaling_config:
        return None
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    given = {k: v for k, v in config.autoscaling_config.items() if k != "target_queued_tokens"}
    if unknown := given.keys() - AutoscalingConfig.model_fields.keys():
        raise ValueError(f"autoscaling_config: unknown key {min(unknown)!r}")
    policy = cast(Any, AutoscalingPolicy)(policy_function=f"{__name__}:{replicas_wanted.__name__}")
    return AutoscalingConfig(**{"policy": policy, **given})
