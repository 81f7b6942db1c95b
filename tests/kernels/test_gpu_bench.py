"""The GPU bench and the tuner, on a CPU: order, budget, records, failures, verdicts."""

import functools
import json
import time
from pathlib import Path

import pytest
import torch

from marrow.kernels import compiled, dispatch, gpu_bench, gpu_cases, gpu_times, tile, tuning
from marrow.kernels.configs import tables
from marrow.kernels.gpu_bench import Bench, Case, Goal, Work, table
from marrow.kernels.gpu_times import TooLateError, limited
from marrow.kernels.norms import rms_norm  # noqa: F401 (registers the operator that the cases below name)
from marrow.kernels.tuning import tune


class Clock:
    """Time that passes only in `nap`: ratios are exact, however busy the machine is."""

    now = 0.0


def nap(seconds):
    def run():
        Clock.now += seconds

    return run


def times(functions, device):
    took = {}
    for name, function in functions.items():
        before = Clock.now
        function()
        took[name] = [Clock.now - before]
    return took


@pytest.fixture(autouse=True)
def _virtual_time(monkeypatch):
    monkeypatch.setattr(gpu_bench, "times", times)
    monkeypatch.setattr(tuning, "times", times)


SHORT = nap(0.004)


def case(shape, ours=SHORT, peers=None, goals=(), late=(), error=None, made=None):
    def make(device, is_tiny):
        if made is not None:
            made.append(shape)
        inputs = (torch.ones(4, dtype=torch.bfloat16),)
        return Work(ours, inputs, peers or {}, 4e6, 1e9, late, error)

    return Case("rms_norm", shape, "forward", "bf16", tuple(goals), make)


def lines(folder):
    return [json.loads(line) for line in (folder / "kernels.jsonl").read_text().splitlines()]


def run(cases, tmp_path, **settings):
    alone = {"device": "cpu", "budget_s": 60.0, "out": tmp_path, "is_tiny": True, "hook": lambda *_: {}}
    settings = alone | settings
    return Bench(**settings).run(cases)


def fail():
    raise ValueError("broken peer")


def test_roofs_come_first_and_rows_in_their_order(tmp_path):
    rows = run([case("b"), case("a")], tmp_path)
    assert [row["shape"] for row in rows] == ["b", "a"]
    told = lines(tmp_path)
    assert told[0]["kind"] == "device"
    assert {"device", "torch", "cuda", "triton", "date"} <= set(told[0])
    assert [line["kind"] for line in told] == sorted(
        (line["kind"] for line in told), key=["device", "roof", "row"].index
    )
    assert {"copy", "read", "bf16"} <= {line["name"] for line in told if line["kind"] == "roof"}
    assert [line["shape"] for line in told if line["kind"] == "row"] == ["b", "a"]


def test_ratios_and_goals_follow_from_times(tmp_path):
    peers = {"slow": lambda: nap(0.012), "fast": lambda: nap(0.002)}
    goals = [Goal("peer", 1.5, "slow"), Goal("peer", 1.0, "fast"), Goal("peer", 1.0, "absent")]
    (row,) = run([case("x", peers=peers, goals=goals)], tmp_path)
    assert row["ratios"] == pytest.approx({"slow": 3.0, "fast": 0.5})
    assert row["ours_us"] == pytest.approx(4000.0)
    assert [goal["met"] for goal in row["goals"]] == [True, False, None]
    assert row["gbytes_per_s"] == pytest.approx(4e6 / row["ours_us"] / 1e3)
    assert row["tflops"] == pytest.approx(1e9 / row["ours_us"] / 1e6)
    text = (tmp_path / "kernels.txt").read_text()
    assert "met" in text
    assert "MISSED" in text
    assert "not measured" in text


def test_bandwidth_and_error_have_their_verdicts(tmp_path):
    goals = [Goal("copy", 1e-9), Goal("read", 1e9), Goal("error", 1e-5)]
    (row,) = run([case("x", goals=goals, error=lambda: 1e-6)], tmp_path)
    assert [goal["met"] for goal in row["goals"]] == [True, False, True]
    (row,) = run([case("x", goals=goals, error=lambda: 1e-4)], tmp_path)
    assert row["goals"][2]["met"] is False


def test_a_peer_that_fails_stops_nothing(tmp_path):
    peers = {"broken": fail, "breaks": lambda: fail, "sound": lambda: nap(0.001)}
    rows = run([case("x", peers=peers), case("y")], tmp_path)
    assert set(rows[0]["peers_failed"]) == {"broken", "breaks"}
    assert "broken peer" in rows[0]["peers_failed"]["broken"]
    assert set(rows[0]["ratios"]) == {"sound"}
    assert "ours_us" in rows[1]


def test_a_peer_of_a_goal_that_is_not_here_is_named(tmp_path):
    goals = [Goal("peer", 1.0, "absent"), Goal("peer", 1.0, "late"), Goal("copy", 0.5)]
    cases = [case("x", peers={"late": lambda: nap(0.001)}, late=("late",), goals=goals)]
    (row,) = run(cases, tmp_path)
    assert row["peers_failed"] == {"absent": "is not here"}
    assert "absent: is not here" in (tmp_path / "kernels.txt").read_text()


def test_liger_is_a_peer_that_may_be_missing(monkeypatch):
    monkeypatch.setattr(gpu_bench, "times", gpu_times.times)
    cases = {case.name: case for case in gpu_cases.all_cases()}
    (row,) = Bench(device="cpu", budget_s=60.0, is_tiny=True).measure(
        [cases["rms_norm 8192x4096 bf16 forward"]]
    )
    assert "Liger" in row["peers_us"] or "liger" in row["peers_failed"]["Liger"]
    assert "error" not in row


def test_a_case_that_fails_stops_no_other(tmp_path):
    missing = Case("none", "z", "forward", "bf16", (), lambda device, tiny: __import__("marrow.kernels.none"))
    rows = run([case("x", ours=fail), missing, case("y")], tmp_path)
    assert "broken peer" in rows[0]["error"]
    assert rows[1]["error"] == "there is no such operator"
    assert "ours_us" in rows[2]


def test_late_peers_have_a_second_round(tmp_path):
    order = []
    peers = {
        "early": lambda: order.append("early") or nap(0.001),
        "late": lambda: order.append(told()) or order.append("late") or nap(0.02),
    }

    def told():
        text = (tmp_path / "kernels.txt").read_text()
        return "a table of the first round" if "rms_norm y" in text and "speed of late" not in text else text

    rows = run([case("x", peers=peers, late=("late",)), case("y", made=order)], tmp_path)
    assert order == ["early", "y", "a table of the first round", "late"]
    assert set(rows[0]["ratios"]) == {"early", "late"}
    assert [line["shape"] for line in lines(tmp_path) if line["kind"] == "row"] == ["x", "y", "x"]


@pytest.mark.slow
def test_the_budget_is_kept_and_the_rows_that_are_there_stay(tmp_path):
    started = time.monotonic()
    endless = [
        case("a"),
        case("b", ours=functools.partial(time.sleep, 60.0)),
        case("c", peers={"late": lambda: nap(0.0)}, late=("late",)),
    ]
    rows = run(endless, tmp_path, budget_s=2.5)
    assert time.monotonic() - started < 6.0
    assert "ours_us" in rows[0]
    assert "took longer than" in rows[1]["error"]
    assert rows[2]["error"] == "no time was left"
    assert len([line for line in lines(tmp_path) if line["kind"] == "row"]) == 3


@pytest.mark.slow
def test_a_late_peer_without_time_leaves_the_first_round_s_figures(tmp_path):
    (row,) = run(
        [case("x", peers={"late": lambda: functools.partial(time.sleep, 60.0)}, late=("late",))],
        tmp_path,
        budget_s=2.5,
    )
    assert "ours_us" in row
    assert "late" in row["peers_failed"]
    assert "error" not in row


def test_a_caller_brings_peers(tmp_path):
    def hook(op, direction, inputs):
        assert (op, direction, len(inputs)) == ("rms_norm", "forward", 1)
        return {"Liger": lambda: nap(0.008)}

    (row,) = run([case("x", goals=[Goal("peer", 1.0, "Liger")])], tmp_path, hook=hook)
    assert row["goals"][0]["met"] is True


def test_the_kernel_table_is_left_as_it_was(tmp_path):
    dispatch.reset("reference")
    run([case("x")], tmp_path)
    assert dispatch.wanted() == "reference"


def test_an_inner_limit_leaves_the_outer_one_in_force():
    def wait_twice():
        with limited(0.3):
            with pytest.raises(TooLateError), limited(0.05):
                time.sleep(5)
            time.sleep(5)

    with pytest.raises(TooLateError):
        wait_twice()
    time.sleep(0.4)  # nothing is left that could strike


def test_all_cases_have_names_of_their_own_and_one_of_each_group_comes_first():
    cases = gpu_cases.all_cases()
    assert len({case.name for case in cases}) == len(cases)
    first = {case.op for case in cases[:11]}
    assert {"rms_norm", "swiglu", "attention", "paged_attention", "linear_cross_entropy"} <= first
    assert {"int4_linear", "top_k"} <= first
    has_goal = [bool(case.goals) for case in cases]
    assert has_goal == sorted(has_goal, reverse=True)


COPY = {"forward": "speed >= 0.85 of copy bandwidth", "forward+backward": "speed >= 0.75 of copy bandwidth"}
LIGER, FLEX = "speed >= 1.00 of Liger", "speed >= 1.00 of FlexAttention"
CUDNN = {"forward": "speed >= 0.80 of SDPA cuDNN", "backward": "speed >= 0.70 of SDPA cuDNN"}
# What has to be measured on a GPU: the row, its goals, and the peers that the case makes itself.
WANTED = (
    *(
        (f"{op} {shape} bf16 {way}", {COPY[way], *liger}, {"eager", "torch.compile"})
        for op, shape, liger in (
            ("rms_norm", "8192x4096", [LIGER]),
            ("add_rms_norm", "8192x4096", [LIGER]),
            ("layer_norm", "8192x4096", [LIGER]),
            ("swiglu", "4096x11008", [LIGER]),
            ("geglu", "4096x11008", [LIGER]),
            ("rope", "16384x32x128", [LIGER]),
            ("softcap", "4096x32768", []),
        )
        for way in COPY
    ),
    *(
        (f"attention D{size} T{tokens} bf16 {way}", {CUDNN[way], FLEX}, {"SDPA flash", "FlexAttention"})
        for size in (64, 128)
        for tokens in (1024, 4096, 16384)
        for way in CUDNN
    ),
    *(
        (
            f"paged_attention B{batch} context {context} bf16 forward",
            {"speed >= 0.80 of read bandwidth", "speed >= 1.00 of dense SDPA folded"},
            {"dense SDPA folded", "gather+SDPA"},
        )
        for batch, context in ((64, 4096), (8, 32768), (256, 1024))
    ),
    (
        "linear_cross_entropy N8192 D4096 V128256 bf16 forward+backward",
        {"speed >= 0.95 of Liger", "memory >= 1.00 of Liger", "error <= 1e-05"},
        {"torch", "torch.compile"},
    ),
    *(
        (f"int4_linear M{rows} 11008x4096 bf16 forward", {goal}, {"bf16 cuBLAS", "aten int4"})
        for rows, goal in (
            (1, "speed >= 3.00 of bf16 cuBLAS"),
            (16, "speed >= 3.00 of bf16 cuBLAS"),
            (64, "speed >= 1.00 of bf16 cuBLAS"),
        )
    ),
    *(
        (f"fp8_linear {size} fp8 forward", {"speed >= 0.90 of torch._scaled_mm"}, {"torch._scaled_mm"})
        for size in (4096, 8192)
    ),
    ("top_k 1 of 1M x 768 fp32 forward", {"speed >= 0.85 of read bandwidth"}, {"GEMM+topk"}),
)


@pytest.mark.parametrize(("name", "goals", "peers"), WANTED, ids=[name for name, _, _ in WANTED])
def test_what_has_to_be_measured_is_there_with_its_goals_and_peers(name, goals, peers):
    case = next(case for case in gpu_cases.all_cases() if case.name == name)
    assert goals <= {str(goal) for goal in case.goals}
    assert peers <= set(case.make("cpu", True).peers)


def test_every_operator_with_a_triton_path_has_a_case_by_which_it_is_tuned():
    failed = compiled.load_operators()
    with_triton = {name for name, operator in dispatch.operators().items() if "triton" in operator.paths}
    assert failed == []
    assert with_triton == {case.op for case in gpu_cases.all_cases()}


@pytest.mark.slow
@pytest.mark.parametrize("case", gpu_cases.all_cases(), ids=lambda case: case.name)
def test_every_case_runs_on_tiny_shapes(case, monkeypatch):
    monkeypatch.setattr(gpu_bench, "times", gpu_times.times)
    (row,) = Bench(device="cpu", budget_s=60.0, is_tiny=True).measure([case])
    assert "error" not in row, row["error"]
    assert row["ours_us"] > 0


def test_the_committed_table_names_every_case_and_says_where_it_was_measured_or_that_it_was_not():
    text = (Path(__file__).parents[2] / "bench" / "results" / "kernels_gpu.txt").read_text()
    cases = gpu_cases.all_cases()
    if text.startswith("not measured"):
        assert text == gpu_bench.unmeasured(cases)
    else:
        assert all(word in text.splitlines()[0] for word in ("device", "torch", "cuda", "triton", "date"))
        assert {case.name for case in cases} <= set(text.splitlines())


def test_the_table_of_nothing_is_a_headline():
    assert "roofs" in table([], {"copy": 1.0}, {"device": "cpu"})


# Tuning


@pytest.mark.slow
@pytest.mark.skipif(not tile.IS_INTERPRETED, reason="kernels run on a GPU here")
@pytest.mark.parametrize("case", gpu_cases.all_cases(), ids=lambda case: case.name)
def test_what_a_case_would_launch_can_be_recorded(case):
    """Torch's part of an operator runs on outputs that nothing has written: no index may come of them."""
    if case.goals:  # the examples of the others are made by other operators, slow when interpreted
        dispatch.reset("triton")
    work = case.make("cpu", True)
    dispatch.reset("triton")
    launches = tuning.launches_of(work.ours, {}, 90)
    assert launches
    assert all(min(launch.grid) > 0 for launch in launches)


def tunable(naps, default, made=None):
    """A case whose time follows its configuration."""

    def make(device, is_tiny):
        def ours():
            candidates = [{"BLOCK": block} for block in naps if block != default]
            chosen = tile.config("planted", "small", {"BLOCK": default}, candidates)
            nap(naps[chosen["BLOCK"]] or fail())()

        return Work(ours, (torch.ones(1),), {}, 1.0, 1.0)

    return Case("rms_norm", "x", "forward", "bf16", (), make)


def test_the_fastest_configuration_is_written(tmp_path):
    said = []
    naps = {16: 0.01, 32: 0.002, 64: 0.02, 128: 0}  # 0: a candidate that fails
    path = tune([tunable(naps, 16)], device="cpu", folder=tmp_path, tell=said.append)
    assert tables.load("cpu", tmp_path) == {"planted": {"small": {"BLOCK": 32}}}
    assert path.parent == tmp_path
    assert len(said) == 1


def test_a_default_that_is_fastest_stays(tmp_path):
    tune([tunable({16: 0.002, 32: 0.01}, 16)], device="cpu", folder=tmp_path)
    assert tables.load("cpu", tmp_path) == {"planted": {"small": {}}}


def test_a_case_that_cannot_be_tuned_stops_no_other(tmp_path):
    said = []
    cases = [case("x", ours=fail), tunable({16: 0.01, 32: 0.002}, 16)]
    tune(cases, device="cpu", folder=tmp_path, tell=said.append)
    assert "broken peer" in said[0]
    assert tables.load("cpu", tmp_path)["planted"] == {"small": {"BLOCK": 32}}


def test_real_times_follow_the_work():
    took = gpu_times.times({"long": functools.partial(time.sleep, 0.02), "none": lambda: None}, "cpu")
    assert min(took["long"]) >= 0.02
    assert len(took["none"]) == len(took["long"]) >= 3


class Recorder:
    """Stands for torch on a GPU: notes what is called, and tells times that grow by one."""

    int32 = "int32"

    def __init__(self):
        self.noted, self.cuda, self.now = [], self, 0.0

    def empty(self, *size, **settings):
        self.bytes = 4 * size[0]
        return self

    def zero_(self):
        self.noted.append("the L2 is written over")

    def _sleep(self, cycles):
        self.noted.append("the GPU sleeps")

    def synchronize(self):
        self.noted.append("the host waits")

    def Event(self, enable_timing):  # noqa: N802
        return Mark(self)


class Mark:
    def __init__(self, recorder):
        self.recorder = recorder

    def record(self):
        self.recorder.noted.append("mark")
        self.recorder.now += 1.0
        self.at = self.recorder.now

    def elapsed_time(self, other):
        return other.at - self.at


def test_on_a_gpu_each_run_is_between_events_on_a_cold_cache_and_in_turns(monkeypatch):
    gpu = Recorder()
    monkeypatch.setattr(gpu_times, "torch", gpu)
    functions = {name: functools.partial(gpu.noted.append, name) for name in ("ours", "theirs")}
    took = gpu_times.times(functions, "cuda")
    assert gpu.bytes >= 128 << 20
    turn = ["the GPU sleeps", "the L2 is written over", "mark", "ours", "mark"]
    turn += ["the GPU sleeps", "the L2 is written over", "mark", "theirs", "mark", "the host waits"]
    runs = len(took["ours"])
    assert gpu.noted[-runs * len(turn) :] == turn * runs
    assert runs >= 10
    assert took == {name: [0.001] * runs for name in functions}
