"""`tensorray build`: bad input on a cluster of one node, everything else on one of three.

All plans are built by TensorRT-RTX for small models; nothing here needs a GPU.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from helpers.plans import TARGET, request
from helpers.published_configs import PUBLISHED
from helpers.quantized_files import gptq, quantize_model
from helpers.ray_nodes import RayNodes, ray_nodes
from ray.job_submission import JobStatus, JobSubmissionClient

from tensorray.actors import build_job
from tensorray.actors.build_job import RayWorkers, Sites, survey_nodes
from tensorray.builder.build import PlanRequest, compile_plan
from tensorray.builder.manifest import SCHEMA, read_manifest
from tensorray.builder.plan import Plan
from tensorray.builder.store import DirectoryStore, open_store
from tensorray.builder.tensorrt_flavour import Target
from tensorray.cluster import build_command, cli
from tensorray.cluster.build import build
from tensorray.cluster.connect import connect

pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'tensorray[rtx]'")
pytestmark = pytest.mark.ray

MODEL = str(Path(__file__).parent / "fixtures" / "models" / "llama3")
EXAMPLES = Path(__file__).parent.parent / "deploy" / "examples"
#: Enough to have every plan of it built twice over in seconds.
SMALL = ("build", MODEL, "--tp", "2", "--target", "sm_89,sm_120")
PATIENCE = 300.0

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tensorray(
    ray_cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Command:
    """Run a command line in this process, with a store of its own: exit status, stdout, stderr."""
    monkeypatch.setenv("TENSORRAY_STORE", str(tmp_path / "store"))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tensorray", *arguments])
        try:
            cli.main()
            status = 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
        return status, *capfd.readouterr()

    return run


def plans(output: str) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads(output)["plans"]
    return listed


def states(output: str) -> Counter[str]:
    return Counter(plan["state"] for plan in plans(output))


def files(store: Path) -> list[Path]:
    return sorted((store / "plans").glob("*.plan"))


# --- one node ---------------------------------------------------------------------------------


def test_the_store_ends_up_with_every_plan_and_a_manifest(
    tensorray: Command, tmp_path: Path
) -> None:
    status, out, _ = tensorray(*SMALL, "--dry-run", "--json")
    assert (status, states(out)) == (0, {"missing": 12})
    assert not (tmp_path / "store").exists()
    assert json.loads(out)["manifest"] is None

    status, out, err = tensorray(*SMALL, "--json")
    assert (status, states(out)) == (0, {"compiled": 12}), err
    listed = plans(out)
    assert {path.stem for path in files(tmp_path / "store")} == {plan["key"] for plan in listed}
    assert all(plan["seconds"] > 0 and plan["bytes"] > 1000 and plan["node"] for plan in listed)
    assert "layers 0-1: o, for sm_120: " in err, "a line a segment where there is no terminal"

    where = json.loads(out)["manifest"]
    manifest = read_manifest(Path(where).read_bytes(), where)
    assert manifest.checkpoint.model == MODEL
    assert (manifest.tp_size, manifest.pp_size, manifest.dtypes.compute) == (2, 1, "float32")
    by_target = {"sm_89": manifest.keys("sm_89"), "sm_120": manifest.keys("sm_120")}
    assert by_target == {
        name: [plan["key"] for plan in listed if plan["target"] == name] for name in by_target
    }
    store = open_store(str(tmp_path / "store"))
    for key in by_target["sm_89"]:
        plan = store.get(key)
        assert plan is not None
        assert plan.target.architecture == "sm_89"

    # Another layout shares what is the same in it: here, nothing but the add.
    status, out, _ = tensorray(*SMALL, "--dry-run", "--json", "--pp", "2")
    assert states(out)["reused"] >= 2
    status, out, _ = tensorray(*SMALL)
    assert status == 0
    assert re.search(r"sm_89, tensorrt_rtx +│ +6 │ +6 │ +0 │ +0 │", out)
    assert f"Manifest {where}" in out


def test_segments_that_tensorrt_has_nothing_for_are_listed(
    tensorray: Command, tmp_path: Path
) -> None:
    """Act-order whose inputs two ranks split."""
    quantize_model(Path(MODEL), tmp_path / "m", gptq(act_order=True))
    command = ("build", str(tmp_path / "m"), "--tp", "2", "--target", "sm_89")
    status, out, err = tensorray(*command, "--json")
    assert status == 0, err
    marked = [plan for plan in plans(out) if plan["state"] == "kernels"]
    assert {plan["segment"] for plan in marked} == {
        "layers 0-1: o",
        "layers 0-1: gate_up down",
    }
    where = json.loads(out)["manifest"]
    manifest = read_manifest(Path(where).read_bytes(), where)
    assert set(manifest.kernels) == {plan["key"] for plan in marked}
    kept = {path.stem for path in files(tmp_path / "store")}
    assert set(manifest.keys("sm_89")) == kept
    assert not kept & set(manifest.kernels)

    status, out, _ = tensorray(*command)
    assert status == 0
    lines = " ".join(out.split())
    assert re.search(r"failed.*kernels", out)
    assert "own kernels run layers 0-1: o, for sm_89: tensorrt_rtx" in lines
    assert "can't multiply by int4 weights with groups of 16, act-order with inputs split" in lines
    assert f"Manifest {where}" in out


def test_a_dry_run_tells_what_it_can_where_a_target_has_no_node(tensorray: Command) -> None:
    command = ("build", MODEL, "--tp", "2", "--dry-run", "--target", "sm_89,sm_90")
    status, out, _ = tensorray(*command, "--json")
    assert (status, states(out)) == (0, {"missing": 6})
    (unknown,) = json.loads(out)["unknown"]
    assert unknown["target"] == "sm_90"
    assert unknown["segments"] == [plan["segment"] for plan in plans(out)]
    assert "tensorrt needs a node with an sm_90 GPU" in unknown["reason"]

    status, out, _ = tensorray(*command[:-1], "sm_90")
    assert status == 0
    assert "6 segments, no node can build for sm_90:" in out


def test_only_a_named_cluster_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda address=None, **_: asked.append(address))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert connect()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert not connect()
    assert asked == ["local", None], "None: what RAY_ADDRESS says"
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    assert not connect()
    assert len(asked) == 2


def test_a_config_is_enough(tensorray: Command, tmp_path: Path) -> None:
    config = json.loads((Path(MODEL) / "config.json").read_text())
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    command = ("build", "--model", str(tmp_path / "bare"), "--target", "sm_89", "--dry-run")
    status, _, err = tensorray(*command)
    assert status == 2
    assert "no weights" in err
    assert "--config-only" in err
    status, out, _ = tensorray(*command, "--config-only", "--json")
    assert (status, set(states(out))) == (0, {"missing"})


def test_from_python(ray_cluster: None, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": MODEL, "target": ["sm_89"], "store": str(tmp_path)}
    settings |= {"dtype": "float16", "profiles": "1:8:64"}
    report = build(**settings)
    assert {outcome.state for outcome in report.outcomes} == {"compiled"}
    assert report.failures == []
    plan = open_store(str(tmp_path)).get(report.outcomes[0].request.key)
    assert plan is not None
    assert (plan.dtypes.compute, plan.dtypes.residual) == ("float16", "float16")
    assert plan.profiles.max_rows == 64
    assert {outcome.state for outcome in build(**settings).outcomes} == {"reused"}


def test_the_example_builds_several_layouts(
    ray_cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TENSORRAY_STORE", str(tmp_path))
    example = runpy.run_path(str(EXAMPLES / "build_plans.py"))
    assert example["main"](MODEL, "sm_89") == 0
    assert re.search(r"^tp 1: (\d) plans of .*, \1 of them compiled", capsys.readouterr().out)


def test_a_segment_that_fails_is_named_with_tensorrts_message_and_the_rest_lands(
    tensorray: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def narrow_one(request: PlanRequest) -> Plan:
        """Compile for real, the output projection with a weight that does not fit."""
        if request.name == "layers 0-1: o":
            (weight,) = request.segment.weights
            narrow = replace(weight, shape=(weight.shape[0], weight.shape[1] - 1))
            segment = replace(request.segment, weights=(narrow,))
            request = replace(request, segment=segment)
        return compile_plan(request)

    broken = functools.partial(build_command.build_needs, compile=narrow_one)
    monkeypatch.setattr(build_command, "build_needs", broken)
    status, out, err = tensorray(*SMALL, "--json")
    assert status == 1
    assert states(out) == {"compiled": 10, "failed": 2}
    assert json.loads(out)["manifest"] is None
    assert re.search(r"Error: layers 0-1: o, for sm_89: 1\.linear/matmul: .*must match", err)
    monkeypatch.undo()
    monkeypatch.setenv("TENSORRAY_STORE", str(tmp_path / "store"))
    status, out, _ = tensorray(*SMALL, "--json")
    assert (status, states(out)) == (0, {"reused": 10, "compiled": 2})


def test_a_build_that_crashes_is_tried_again_and_then_named(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(request: PlanRequest) -> Plan:
        if request.name == "layers 0-1: o":
            with open(tmp_path / "tries", "a") as tries:
                tries.write("x")
            os._exit(11)
        return compile_plan(request)

    monkeypatch.setattr(build_job, "MAX_RETRIES", 1)
    settings: dict[str, Any] = {"model": MODEL, "tp": 2, "target": "sm_89"}
    report = build(**settings, store=str(tmp_path / "store"), compile=crash)
    assert Counter(each.state for each in report.outcomes) == {"compiled": 5, "failed": 1}
    assert (tmp_path / "tries").read_text() == "xx"
    (failure,) = report.failures
    assert re.match(r"layers 0-1: o, for sm_89: WorkerCrashedError: .*died", failure)


@pytest.mark.parametrize("count", [1, 2])
def test_what_no_node_is_left_to_build_is_given_up(
    ray_cluster: None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_job, "_LOOK_EVERY", 0.2)
    gone = frozenset(ray.NodeID.from_random().hex() for _ in range(count))
    workers = RayWorkers([Sites(TARGET, gone)])
    workers.submit(request())
    (result,) = workers.collect(None)
    assert result.plan is None
    assert result.error == "every node that could build it was lost"
    assert workers.collect(0.0) == []
    workers.close()


H100 = Target("tensorrt", "10.9", "sm_90", "NVIDIA H100 80GB HBM3", ())
H200 = replace(H100, gpu="NVIDIA H200")
RTX = replace(H100, flavour="tensorrt_rtx", gpu=None)


@pytest.mark.parametrize(
    ("tensorrt", "tensorrt_rtx", "chosen"),
    [
        ({"a": H100, "b": H200, "c": H200}, {}, {H100: "a", H200: "bc"}),
        ({"a": H100, "b": "no such GPU"}, {"a": RTX, "b": RTX}, {H100: "a"}),
        ({"a": "pip install tensorrt", "b": "no such GPU"}, {"a": "old", "b": RTX}, {RTX: "b"}),
    ],
    ids=[
        "every GPU model",
        "tensorrt where there is its GPU",
        "tensorrt_rtx where it is installed",
    ],
)
def test_what_builds_for_a_target(
    tensorrt: dict[str, Target | str],
    tensorrt_rtx: dict[str, Target | str],
    chosen: dict[Target, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = {"tensorrt": tensorrt, "tensorrt_rtx": tensorrt_rtx}
    by_node = {
        flavour: {node: {"sm_90": answer} for node, answer in nodes.items()}
        for flavour, nodes in answers.items()
    }
    monkeypatch.setattr(build_job, "_ask", lambda *_: by_node)
    survey = survey_nodes(["sm_90"], ["bfloat16"])
    assert {each.target: "".join(sorted(each.nodes)) for each in survey.sites} == chosen
    assert not survey.lacking


def test_a_refusal_says_what_each_kind_of_node_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {"a": "no such GPU", "b": "no such GPU", "c": "tensorrt can't be imported; pip install"}
    rtx = dict.fromkeys(nodes, "tensorrt_rtx 1.7 has no target 'sm_90'")
    by_node = {
        flavour: {node: {"sm_90": answer} for node, answer in answers.items()}
        for flavour, answers in {"tensorrt": nodes, "tensorrt_rtx": rtx}.items()
    }
    monkeypatch.setattr(build_job, "_ask", lambda *_: by_node)
    survey = survey_nodes(["sm_90"], ["bfloat16"])
    assert not survey.sites
    assert survey.lacking["sm_90"].splitlines() == [
        "no node can build for sm_90:",
        "  no such GPU (2 nodes); tensorrt can't be imported; pip install (1 node)",
        "  tensorrt_rtx 1.7 has no target 'sm_90' (3 nodes)",
    ]


def test_a_damaged_plan_is_built_again(
    tensorray: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = (*SMALL[:-1], "sm_89", "--json")
    assert tensorray(*command)[0] == 0
    cut, foreign, *_ = files(tmp_path / "store")
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    foreign.write_bytes(b"ptrt" + bytes(100))
    status, out, _ = tensorray(*command)
    assert (status, states(out)) == (0, {"reused": 4, "compiled": 2})
    assert caplog.text.count("truncated or corrupt") == 1
    assert caplog.text.count("not a plan of this store") == 1
    assert (status, states(tensorray(*command)[1])) == (0, {"reused": 6})


def test_a_manifest_of_a_later_version_is_left_alone(tensorray: Command) -> None:
    command = (*SMALL[:-1], "sm_89", "--json")
    status, out, _ = tensorray(*command)
    assert status == 0
    manifest = Path(json.loads(out)["manifest"])
    newer = json.loads(manifest.read_text()) | {"schema": SCHEMA + 1, "new": True}
    manifest.write_text(json.dumps(newer))
    status, _, err = tensorray(*command)
    assert status == 2
    assert re.search(rf"Error: {manifest}: .*schema {SCHEMA + 1}.*upgrade tensorray", err)
    assert json.loads(manifest.read_text()) == newer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([MODEL, "--target", "sm_89", "--tp", "3"], r"sizes that do: 1, 2, 4$"),
        ([MODEL, "--target", "sm_89", "--pp", "9"], r"9 pipeline stages for 2 layers.*1 to 2"),
        ([MODEL, "--target", "sm_89", "--tp", "0"], r"--tp: .*greater than or equal to 1"),
        ([MODEL, "--target", "h100"], r"--target: h100 is not a GPU architecture; .*sm_90 \(H100"),
        (
            [MODEL, "--target", "sm_42"],
            r"for sm_42:\n.*\n.*rtx .* has no target 'sm_42'; .*sm_89",
        ),
        ([MODEL, "--target", "sm_89,sm_90"], r"sm_90:\n.*tensorrt needs a node with an sm_90 GPU"),
        ([MODEL, "--target", "sm_89", "--flavour", "tensorrt"], r"needs a node with an sm_89 GPU"),
        ([MODEL], r"--target: Field required"),
        (["--target", "sm_89"], r"which model\?"),
        ([MODEL, "--model", MODEL, "--target", "sm_89"], r"given twice"),
        (
            [MODEL, "--target", "sm_75", "--dtype", "bfloat16"],
            r"for sm_75 has no bfloat16; it has float16, float32",
        ),
        ([MODEL, "--target", "sm_89", "--dtype", "int3"], r"--dtype: .*'bfloat16'.*\(got 'int3'\)"),
        ([MODEL, "--target", "sm_89", "--profiles", "1:2"], r"1:2 is not SMALLEST:BEST:LARGEST"),
        ([MODEL, "--target", "sm_89", "--profiles", "4:2:8"], r"rows must rise"),
        ([MODEL, "--target", "sm_89", "--profiles", "1:2:8,8:8:9"], r"profiles overlap"),
        (["./nowhere", "--target", "sm_89"], r"nowhere: no such file or directory"),
        ([str(Path(__file__).parent), "--target", "sm_89"], r"tests: no config\.json"),
        ([__file__, "--target", "sm_89"], r"a model file must be a \.gguf file"),
        ([MODEL, "--target", "sm_89", "--store", "nowhere://x"], r"store nowhere://x: .*nowhere"),
    ],
)
def test_what_can_not_be_built_is_refused_before_anything_is(
    tensorray: Command, tmp_path: Path, arguments: list[str], message: str
) -> None:
    status, out, err = tensorray("build", *arguments)
    assert status == 2, err
    assert out == ""
    assert re.search(message, err), err
    assert not (tmp_path / "store").exists()


def test_a_read_only_store(tensorray: Command) -> None:
    """/sys lets nobody make directories, root included."""
    if not Path("/sys").is_dir():
        pytest.skip("no /sys")
    status, _, err = tensorray(*SMALL, "--store", "/sys/plans")
    assert status == 1
    assert re.search(r"Error: store /sys/plans: read-only .*choose another one", err)


def test_a_store_that_fills_up_keeps_what_it_has(
    tensorray: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, room = DirectoryStore.write, 3

    def run_out(self: DirectoryStore, name: str, data: bytes) -> None:
        nonlocal room
        if name.endswith(".plan"):
            room -= 1
        if room < 0:
            monkeypatch.setattr(os, "fsync", fail)
        write(self, name, data)

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(DirectoryStore, "write", run_out)
    command = (*SMALL[:-1], "sm_89")
    status, _, err = tensorray(*command)
    assert status == 1
    assert re.search(r"Error: store .*: full \(No space left on device\); make room", err)
    monkeypatch.undo()
    monkeypatch.setenv("TENSORRAY_STORE", str(tmp_path / "store"))
    status, out, _ = tensorray(*command, "--json")
    assert (status, states(out)) == (0, {"reused": 3, "compiled": 3})


# --- three nodes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes(3, dashboard=True) as started:
        yield started


def start(nodes: RayNodes, store: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=nodes.environment(TENSORRAY_STORE=str(store)),
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return out


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)


# A build that says which node it is on, and goes on when told to.
SLOW = """
import json, sys, time
from pathlib import Path
import ray
from tensorray.builder.build import compile_plan
from tensorray.cluster.build import build
from tensorray.cluster.connect import connect
from tensorray.cluster.build_command import as_dict
from tensorray.cluster.generate import results_on_stdout

signs = Path(sys.argv[1])

def compile(request):
    node = ray.get_runtime_context().get_node_id()
    (signs / f"{request.key}.{node}").touch()
    while not (signs / "go").exists():
        time.sleep(0.05)
    return compile_plan(request)

with results_on_stdout() as results:
    report = build(model=sys.argv[2], tp=2, target="sm_89,sm_120", compile=compile)
    print(json.dumps(as_dict(report)), file=results)
"""


def test_a_job_spreads_over_the_nodes_and_survives_the_loss_of_one(
    nodes: RayNodes, tmp_path: Path
) -> None:
    signs = tmp_path / "signs"
    signs.mkdir()

    def places() -> set[tuple[str, str]]:
        """(key, node) of every build that has begun."""
        return {tuple(path.name.split(".")) for path in signs.glob("*.*")}  # type: ignore[misc]

    job = start(nodes, tmp_path / "store", "-c", SLOW, str(signs), MODEL)
    wait_for(lambda: {node for _, node in places()} == set(nodes.nodes), "a build on every node")
    victim = nodes.nodes[1]
    lost = {key for key, node in places() if node == victim}
    assert lost
    nodes.kill(victim)
    (signs / "go").touch()
    listed = plans(finish(job))
    assert [plan["state"] for plan in listed] == ["compiled"] * 12
    assert {path.stem for path in files(tmp_path / "store")} == {plan["key"] for plan in listed}
    assert not {plan["node"] for plan in listed if victim[:8] in plan["node"]}
    assert lost <= {key for key, node in places() if node != victim}, "built again, elsewhere"
    nodes.add()


# A build that needs no GPU, and says where it was done.
ON_GPU = """
import json, sys
import ray
from tensorray.builder.plan import Plan
from tensorray.cluster.build import build
from tensorray.cluster.connect import connect
from tensorray.cluster.build_command import as_dict
from tensorray.cluster.generate import results_on_stdout

def compile(request):
    data = json.dumps([ray.get_runtime_context().get_node_id(), ray.get_gpu_ids()]).encode()
    segment = request.segment.digest()
    asked = (request.dtypes, request.profiles, request.target)
    return Plan(request.key, segment, *asked, (), (), (), 0.5, data)

with results_on_stdout() as results:
    report = build(model=sys.argv[1], target="sm_89,sm_90", compile=compile)
    print(json.dumps(as_dict(report)), file=results)
"""


def test_tensorrt_builds_on_nodes_with_the_gpu_and_has_it_to_itself(
    nodes: RayNodes, tmp_path: Path
) -> None:
    listed = plans(finish(start(nodes, tmp_path, "-c", ON_GPU, MODEL)))
    by_target: dict[str, list[dict[str, Any]]] = {"sm_89": [], "sm_90": []}
    for plan in listed:
        by_target[plan["target"]].append(plan)
    assert {(plan["flavour"], plan["gpu"]) for plan in by_target["sm_89"]} == {
        ("tensorrt_rtx", None)
    }
    assert {(plan["flavour"], plan["version"], plan["gpu"]) for plan in by_target["sm_90"]} == {
        ("tensorrt", "10.99", "NVIDIA H200")
    }
    store = open_store(str(tmp_path))
    for plan in by_target["sm_90"]:
        stored = store.get(plan["key"])
        assert stored is not None
        assert json.loads(stored.data) == [nodes.gpu_node, [0]]
        assert len(stored.profiles.profiles) > 10, "a profile a decode bucket, as kernels are timed"


def test_two_jobs_at_once_share_the_work(nodes: RayNodes, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = ("-m", "tensorray.cluster.cli", *SMALL, "--json")
    jobs = [start(nodes, store, *command) for _ in range(2)]
    first, second = (plans(finish(job)) for job in jobs)
    assert len(files(store)) == len(first) == 12
    for one, other in zip(first, second, strict=True):
        assert one["key"] == other["key"]
        assert {one["state"], other["state"]} == {"compiled", "reused"}
    opened = open_store(str(store))
    assert all(opened.get(plan["key"]) for plan in first)


def submit(nodes: RayNodes, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit -- tensorray build …`, as the example spells it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [EXAMPLES / "build_job.sh", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "RAY_ADDRESS": nodes.dashboard, "PATH": path},
    )


def test_a_submitted_job_says_how_it_went(nodes: RayNodes, tmp_path: Path) -> None:
    """One that fails; test_readme.py submits one that does not."""
    store = tmp_path / "store"
    done = submit(nodes, *SMALL[1:-1], "sm_89", "--store", str(store), "--tp", "3")
    assert done.returncode == 1
    assert "sizes that do: 1, 2, 4" in done.stdout
    (job,) = (
        each
        for each in JobSubmissionClient(nodes.dashboard).list_jobs()
        if each.status == JobStatus.FAILED and str(store) in each.entrypoint
    )
    assert job.driver_exit_code == 2


def test_a_job_that_is_stopped_leaves_a_valid_store(
    nodes: RayNodes, tmp_path: Path, ray_cluster: None
) -> None:
    store = tmp_path / "store"
    (tmp_path / "model").mkdir()
    config = PUBLISHED["gemma-3-27b"].config
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    settings = ("--config-only", "--dtype", "float16", "--store", str(store))
    targets = "sm_75,sm_80,sm_86,sm_89,sm_120,sm_121"
    client = JobSubmissionClient(nodes.dashboard)
    job = client.submit_job(
        entrypoint=" ".join(
            ["tensorray", "build", str(tmp_path / "model"), *settings, "--target", targets]
        )
    )
    wait_for(lambda: len(files(store)) > 0, "a plan in the store")
    client.stop_job(job)
    wait_for(lambda: client.get_job_status(job).is_terminal(), "an end of the job")
    assert client.get_job_status(job) == JobStatus.STOPPED
    opened = open_store(str(store))
    stored = {path.stem for path in files(store)}
    assert all(opened.get(key) for key in stored)
    assert not list((store / "manifests").glob("*"))

    target = opened.get(min(stored))
    assert target is not None
    report = build(
        model=str(tmp_path / "model"),
        config_only=True,
        dtype="float16",
        target=target.target.architecture,
        store=str(store),
    )
    states = Counter(outcome.state for outcome in report.outcomes)
    assert set(states) <= {"reused", "compiled"}
    assert states["reused"] == len(stored & {each.request.key for each in report.outcomes}) > 0
    assert report.manifest is not None
