"""How an evaluation is done. Published success rates differ in this, so results name theirs."""

from __future__ import annotations

from dataclasses import dataclass

from . import schema

_STILL = (0.0,) * schema.ACTION_DIM


@dataclass(frozen=True)
class EvalProtocol:
    """Episodes of a task from its official init states 0, 1, ..., and how each one is run."""

    name: str
    source: str
    episodes: int  # per task
    horizons: tuple[tuple[str, int], ...]  # steps allowed, by suite
    settle_steps: int  # sent before the policy's first observation
    settle_action: tuple[float, ...] = schema.NO_OP

    def horizon(self, suite: str) -> int:
        """Steps allowed; a LIBERO-PRO suite has those of the suite it varies."""
        return dict(self.horizons)[schema.base_suite(suite)]


_OPENVLA = tuple(schema.HORIZONS.items())
PROTOCOLS = {protocol.name: protocol for protocol in (
    EvalProtocol("quick", "openvla with ten episodes", 10, _OPENVLA, schema.SETTLE_STEPS),
    EvalProtocol("libero", "LIBERO, libero/lifelong/metric.py and configs/eval/default.yaml", 20,
                 tuple((suite, 600) for suite in schema.HORIZONS), 5, _STILL),
    EvalProtocol("openvla", "OpenVLA, experiments/robot/libero/run_libero_eval.py", 50, _OPENVLA,
                 schema.SETTLE_STEPS),
    EvalProtocol("lerobot", "LeRobot, lerobot/envs/libero.py and EvalConfig", 10,
                 tuple({**schema.HORIZONS, "libero_spatial": 280}.items()), schema.SETTLE_STEPS),
)}
