"""Multi-agent PPO with a centralised critic: three agents trade replayed market bars for one shared reward.

The algorithm is MAPPO (Yu et al. 2022, arXiv 2103.01955). `create_workload` is the entry point.
"""

from obsinfra.workloads.tactical_mappo.workload import TacticalMappo, create_workload

__all__ = ["TacticalMappo", "create_workload"]
