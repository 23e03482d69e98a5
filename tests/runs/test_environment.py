import os
import shlex
import subprocess
import sys
from importlib import metadata

import pytest

from batchless.report.timings import machine_line
from batchless.runs import environment
from batchless.runs.environment import describe_environment, git_state

NOWHERE = {"git_commit": None, "git_dirty": None}


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    package = tmp_path / "src" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    return package


def test_the_commit_of_a_tracked_package_and_whether_it_changed(checkout):
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "x")
    clean = git_state(checkout)
    assert len(clean["git_commit"]) == 40
    assert clean["git_dirty"] is False
    (checkout / "__init__.py").write_text("x = 1\n")
    assert git_state(checkout) == {"git_commit": clean["git_commit"], "git_dirty": True}


def test_a_package_inside_the_checkout_of_another_project_has_no_commit(checkout):
    git(checkout, "commit", "-q", "--allow-empty", "-m", "theirs")
    assert git_state(checkout) == NOWHERE


def test_a_checkout_without_commits_has_no_commit(checkout):
    git(checkout, "add", ".")
    assert git_state(checkout) == NOWHERE


def test_the_variables_of_a_git_hook_do_not_point_elsewhere(checkout, tmp_path, monkeypatch):
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "x")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert git_state(checkout)["git_dirty"] is False


def test_neither_git_nor_a_checkout_is_needed(tmp_path, monkeypatch):
    assert git_state(tmp_path / "nowhere") == NOWHERE
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(environment.PACKAGE) == NOWHERE


def test_the_command_can_be_given_to_a_shell_again(monkeypatch):
    command = [sys.executable, "-m", "batchless", "train", "--data.root", "my folder/it's"]
    monkeypatch.setattr(sys, "orig_argv", command)
    assert shlex.split(describe_environment(seed=0)["command"]) == command


def test_a_broken_driver_and_a_missing_package_are_no_reason_to_fail(monkeypatch):
    def broken():
        raise RuntimeError("driver too old")

    monkeypatch.setattr("torch.cuda.device_count", broken)
    assert describe_environment(seed=0)["gpu"] is None
    assert environment._version("no-such-distribution-at-all") is None


def test_what_the_allocator_is_told_is_part_of_it(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    assert describe_environment(seed=0)["allocator"] is None
    assert machine_line(describe_environment(seed=0)).endswith(metadata.version("timm"))
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "4000000000")
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    found = describe_environment(seed=0)
    assert found["allocator"] == "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000"
    assert machine_line(found).endswith(f", {found['allocator']}")
