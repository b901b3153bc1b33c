"""Memory limits are found in trees as kernels and container engines make them."""

from __future__ import annotations

from pathlib import Path

import pytest

from obsinfra.monitoring.cgroup import memory_limit, memory_limits

GIB = 2**30
NO_LIMIT_V1 = "9223372036854771712"

V2_MOUNT = "31 23 0:28 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNTS = (
    "30 23 0:27 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755\n"
    "33 30 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
    "35 30 0:32 {root} /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n"
)
V1_MEMBERSHIP = "12:cpu,cpuacct:{path}\n6:memory:{path}\n1:name=systemd:{path}\n"


class Tree:
    """A `/proc` and `/sys` below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def process(self, membership: str, mounts: str) -> None:
        folder = self.root / "proc/self"
        folder.mkdir(parents=True)
        (folder / "cgroup").write_text(membership)
        (folder / "mountinfo").write_text("22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n" + mounts)

    def v2(self, path: str, used: int, limit: int | str, cache: int = 0) -> None:
        folder = self.root / "sys/fs/cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon {used - cache}\nfile {cache}\ninactive_file {cache}\n")

    def v1(self, path: str, used: int, limit: int | str, cache: int = 0, above: str = NO_LIMIT_V1) -> None:
        folder = self.root / "sys/fs/cgroup/memory" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(
            f"cache 1\ninactive_file 1\nhierarchical_memory_limit {above}\ntotal_inactive_file {cache}\n"
        )


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_v2_container_with_its_own_namespace(tree: Tree) -> None:
    """`docker run -m 4g` today: the container is the root of what it sees."""
    tree.process("0::/\n", V2_MOUNT.format(root="/"))
    tree.v2("", 3 * GIB, 4 * GIB, cache=GIB)
    found = memory_limit(tree.root)
    assert found is not None
    assert (found.used_bytes, found.limit_bytes, found.ratio) == (2 * GIB, 4 * GIB, 0.5)


def test_v2_nested_slices_tightest_wins(tree: Tree) -> None:
    """A systemd scope without a limit in a user slice with one, as Slurm and systemd-run make them."""
    tree.process("0::/user.slice/user-1000.slice/job.scope\n", V2_MOUNT.format(root="/"))
    tree.v2("user.slice", 30 * GIB, 32 * GIB)
    tree.v2("user.slice/user-1000.slice", 5 * GIB, 8 * GIB)
    tree.v2("user.slice/user-1000.slice/job.scope", 4 * GIB, "max")
    found = memory_limit(tree.root)
    assert found is not None
    assert (found.used_bytes, found.limit_bytes) == (5 * GIB, 8 * GIB)
    assert found.path.name == "user-1000.slice"
    assert [level.limit_bytes for level in memory_limits(tree.root)] == [8 * GIB, 32 * GIB]
    assert max(level.ratio for level in memory_limits(tree.root)) == 30 / 32


def test_of_equal_limits_the_fullest_counts(tree: Tree) -> None:
    """A pod and its one container often have the same limit; the pod's also pays for its siblings."""
    tree.process("0::/pod/container\n", V2_MOUNT.format(root="/"))
    tree.v2("pod", 7 * GIB, 8 * GIB)
    tree.v2("pod/container", 5 * GIB, 8 * GIB)
    found = memory_limit(tree.root)
    assert found is not None and found.used_bytes == 7 * GIB


def test_v2_without_limits(tree: Tree) -> None:
    tree.process("0::/init.scope\n", V2_MOUNT.format(root="/"))
    (tree.root / "sys/fs/cgroup").mkdir(parents=True)  # the root has no memory.max
    tree.v2("init.scope", GIB, "max")
    assert memory_limit(tree.root) is None
    assert memory_limits(tree.root) == []


def test_v1_container_that_sees_only_itself(tree: Tree) -> None:
    """Docker on v1: /proc names the host's path, the mount shows the container's own level as its root."""
    path = "/docker/0123456789abcdef"
    tree.process(V1_MEMBERSHIP.format(path=path), V1_MOUNTS.format(root=path))
    tree.v1("", 3 * GIB, 4 * GIB, cache=GIB)
    found = memory_limit(tree.root)
    assert found is not None and (found.used_bytes, found.limit_bytes) == (2 * GIB, 4 * GIB)


def test_v1_limit_above_what_is_visible(tree: Tree) -> None:
    tree.process(V1_MEMBERSHIP.format(path="/kubepods/pod1/c1"), V1_MOUNTS.format(root="/kubepods/pod1/c1"))
    tree.v1("", GIB, NO_LIMIT_V1, above=str(2 * GIB))
    found = memory_limit(tree.root)
    assert found is not None and found.limit_bytes == 2 * GIB


def test_v1_nested_on_the_host(tree: Tree) -> None:
    tree.process(V1_MEMBERSHIP.format(path="/slurm/job_7/step_0"), V1_MOUNTS.format(root="/"))
    tree.v1("", 100 * GIB, NO_LIMIT_V1)
    tree.v1("slurm", 90 * GIB, NO_LIMIT_V1)
    tree.v1("slurm/job_7", 10 * GIB, 16 * GIB)
    tree.v1("slurm/job_7/step_0", 9 * GIB, NO_LIMIT_V1, above=str(16 * GIB))
    found = memory_limit(tree.root)
    assert found is not None and (found.used_bytes, found.limit_bytes) == (10 * GIB, 16 * GIB)


def test_hybrid_takes_the_hierarchy_that_has_memory(tree: Tree) -> None:
    mounts = V1_MOUNTS.format(root="/") + "41 30 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    tree.process(V1_MEMBERSHIP.format(path="/job") + "0::/job\n", mounts)
    (tree.root / "sys/fs/cgroup/unified/job").mkdir(parents=True)
    tree.v1("job", GIB, 2 * GIB)
    found = memory_limit(tree.root)
    assert found is not None and found.limit_bytes == 2 * GIB


def test_a_namespace_seen_from_below_does_not_lead_out_of_the_tree(tree: Tree) -> None:
    """A process moved out of its namespace's root sees `/../other`; only the mount itself can be trusted."""
    tree.process("0::/../other\n", V2_MOUNT.format(root="/"))
    tree.v2("", GIB, 2 * GIB)
    tree.v2("../other", GIB, GIB)
    found = memory_limit(tree.root)
    assert found is not None and found.limit_bytes == 2 * GIB


def test_a_mount_point_with_a_blank(tree: Tree) -> None:
    tree.process("0::/\n", r"31 23 0:28 / /sys/fs/cgroup/a\040b rw - cgroup2 cgroup2 rw")
    tree.v2("a b", GIB, 2 * GIB)
    assert memory_limit(tree.root) is not None


def test_cache_can_exceed_usage_for_a_moment(tree: Tree) -> None:
    tree.process("0::/\n", V2_MOUNT.format(root="/"))
    tree.v2("", GIB, 4 * GIB, cache=2 * GIB)
    found = memory_limit(tree.root)
    assert found is not None and found.used_bytes == 0


@pytest.mark.parametrize("text", ["", "lots", "-1", "0"])
def test_an_unreadable_limit_is_no_limit(tree: Tree, text: str) -> None:
    tree.process("0::/\n", V2_MOUNT.format(root="/"))
    tree.v2("", GIB, text)
    assert memory_limit(tree.root) is None


def test_without_cgroups(tree: Tree) -> None:
    assert memory_limit(tree.root) is None
    tree.process("", "")
    assert memory_limit(tree.root) is None


def test_this_very_machine_can_be_read() -> None:
    """Whatever it is, it has the shape promised."""
    for level in memory_limits():
        assert level.limit_bytes > 0 and level.used_bytes >= 0 and level.path.is_dir()
