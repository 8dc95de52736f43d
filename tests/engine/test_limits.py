"""What the machine and its cgroups allow."""

from __future__ import annotations

from pathlib import Path

from engine import limits


def group(root: Path, path: str, **files: str) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content + "\n")


def test_cgroup_v2_limits_hold_up_the_tree(tmp_path: Path) -> None:
    membership = tmp_path / "self"
    membership.write_text("0::/pod/app\n")
    group(tmp_path, "pod/app", cpu__max="max 100000", memory__max="max")
    group(tmp_path, "pod", cpu__max="100000 100000", memory__max=str(2**30))
    assert limits.cores(tmp_path, membership) == 1
    assert limits.memory(tmp_path, membership) == 2**30


def test_cgroup_v1_limits(tmp_path: Path) -> None:
    membership = tmp_path / "self"
    membership.write_text("4:memory:/app\n3:cpu,cpuacct:/app\n")
    group(tmp_path, "cpu", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    group(tmp_path, "memory/app", memory__limit_in_bytes=str(3 * 2**20))
    group(tmp_path, "memory", memory__limit_in_bytes=str(2**63 - 4096))
    assert limits.cores(tmp_path, membership) == 1
    assert limits.memory(tmp_path, membership) == 3 * 2**20


def test_without_a_cgroup_the_machine_counts(tmp_path: Path) -> None:
    assert limits.cores(tmp_path, tmp_path / "none") >= 1
    assert limits.memory(tmp_path, tmp_path / "none") > 2**20
