"""The suites of benchmarks/: right answers, wrong ones seen, nothing measured as something else."""

import dataclasses
import inspect

import pytest
import torch

import bench_cache
import bench_capture
import bench_losses
import bench_training
import kd
from kd_bench import losses, machine, measure, peers, plain
from kd_bench.suite import SMOKE, SMOKE_MODELS, Problem, parse_divergence

MODULES = (bench_losses, bench_cache, bench_capture, bench_training)
SMOKED = [problem for module in MODULES for problem in module.problems("cpu", None, True)]
ROWS = [
    (problem, implementation)
    for problem in SMOKED
    for implementation in problem.entrants()
    if implementation.package is None
    and not implementation.bare
    and "compiled" not in implementation.name
]
# The largest error of a probability that each codec may make.
CODECS = {"kd": 2e-2, "kd log8": 3e-3, "kd float32": 0.0, "pytorch": 0.0}


def errors(problem, implementation, damage=None):
    inputs = problem.suite.few(problem.suite.inputs(problem))
    truth = problem.suite.truth(problem, inputs)
    value, results = implementation.build(problem, inputs).check()
    return problem.suite.errors((value, results if damage is None else damage(results)), truth)


def of(suite, name):
    return next(i for i in suite.implementations if i.name == name)


@pytest.mark.parametrize(("problem", "implementation"), ROWS, ids=lambda x: getattr(x, "name", x))
def test_answers_are_checked_and_right(problem, implementation):
    value, worst = errors(problem, implementation)
    if problem.suite.name.startswith("cache"):
        assert worst <= CODECS[implementation.name] + 1e-12
    elif problem.suite.name == "capture":
        assert worst < (2e-2 if implementation.name == "kd" else 1e-6)
    elif not implementation.approximate:
        assert value < 1e-5 and worst < 1e-5


def test_every_suite_has_ours_and_plain_pytorch_and_is_planned_on_both_devices():
    suites = {problem.suite.name: problem.suite for problem in SMOKED}
    for name, suite in suites.items():
        takers = {i.name for i in suite.implementations}
        assert {"kd", "pytorch"} <= takers or name == "cache-read-packed"
    for device in ("cpu", "cuda"):
        planned = {p.suite.name for m in MODULES for p in m.problems(device, None, False)}
        assert planned >= suites.keys() - {"dense-loaded"}
    names = {p.name for p in bench_losses.problems("cuda", None, False)}
    assert "linear/qwen2.5-7b<-r1-distill-32b/bfloat16/forward_kl" in names


def test_truth_is_the_reference_backends_answer():
    problem = Problem(bench_losses.LINEAR, SMOKE, "float32", "jsd(0.5)")
    inputs = losses.make_inputs(problem)
    truth = losses.exact_answer(problem, inputs)
    hidden, weight = (inputs[n].double().requires_grad_() for n in ("hidden", "weight"))
    teacher = kd.Hidden(inputs["teacher_hidden"].double(), inputs["teacher_weight"].double())
    loss = kd.jsd(0.5)(kd.Hidden(hidden, weight), teacher, backend="reference")
    want = torch.autograd.grad(loss, [hidden, weight])
    assert truth.value == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(truth.results["hidden"], want[0])
    torch.testing.assert_close(truth.results["weight"], want[1][truth.ids])


def test_a_wrong_answer_shows_in_the_error_columns():
    problem, ours = Problem(bench_losses.LINEAR, SMOKE), of(bench_losses.LINEAR, "kd")
    found = errors(problem, ours, lambda r: r | {"weight": 1.1 * r["weight"]})
    assert found[1] == pytest.approx(0.1, rel=1e-3)
    read = Problem(bench_cache.READ, SMOKE_MODELS)
    damaged = errors(read, of(read.suite, "kd float32"), lambda r: r | {"ids": r["ids"] + 1})
    assert damaged[1] > 1e-4
    step = Problem(bench_training.TRAINING, SMOKE_MODELS, "float32", "sft")
    damaged = errors(step, of(step.suite, "kd"), lambda r: r | {"norm": 1.3 * r["norm"]})
    assert damaged[1] == pytest.approx(0.3, rel=1e-3)


def test_written_bytes_are_told():
    problem = Problem(bench_cache.WRITE, SMOKE_MODELS)
    step = of(problem.suite, "kd float32").build(problem, problem.suite.inputs(problem))
    step.check()
    assert step.detail.endswith(" bytes/token")


# --- divergences ----------------------------------------------------------------------------------


def divergences():
    """Every divergence that kd exports, those with parameters at some values."""
    found = []
    for name in kd.__all__:
        value = getattr(kd, name)
        if isinstance(value, kd.Divergence):
            found.append(value)
        elif callable(value) and not inspect.isclass(value):
            if inspect.signature(value).return_annotation in ("Divergence", kd.Divergence):
                numbers = [0.3 for p in inspect.signature(value).parameters.values()
                           if p.kind is p.POSITIONAL_OR_KEYWORD]  # fmt: skip
                found.append(value(*numbers))
    return found


def test_every_divergence_has_a_twin_in_plain_pytorch():
    assert len(divergences()) >= 8
    assert plain.TWINS.keys() == {d.name for d in divergences()}


@pytest.mark.parametrize("d", divergences(), ids=str)
def test_a_twin_is_what_the_oracle_computes(d):
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(4, 11, generator=g, dtype=torch.float64) for _ in range(2))
    log_p, log_q = t.log_softmax(-1), z.log_softmax(-1)
    want = d(z, t, reduction="none", backend="reference")
    torch.testing.assert_close(plain.divergence_of(d, log_p, log_q), want)
    torch.testing.assert_close(plain.written_by_hand(d, log_p, log_q), want.mean())
    assert parse_divergence(str(d)) == d


@pytest.mark.parametrize("build", [
    peers.trl_chunked, peers.trl_gkd, peers.liger_chunked, peers.liger_jsd, peers.liger_linear_jsd,
    peers.torchtune_chunked, peers.liger_kl, peers.liger_linear_kl, peers.fla_linear_kl,
])  # fmt: skip
def test_a_divergence_a_peer_does_not_have_is_an_error_naming_both(build):
    problem = Problem(bench_losses.LINEAR, SMOKE, "float32", "alpha_beta(0.2,0.7)")
    peer = build.__name__.split("_")[0]
    with pytest.raises(ValueError, match=rf"{peer}.* has no alpha_beta\(0.2.*must not be measured"):
        build(problem, losses.make_inputs(problem))


def test_no_peer_is_asked_for_a_divergence_it_does_not_have():
    problem = Problem(bench_losses.LINEAR, SMOKE, "float32", "total_variation")
    assert {i.name for i in problem.entrants()} == {
        "kd", "bare GEMM", "pytorch", "pytorch compiled",
    }  # fmt: skip


def test_plain_pytorch_without_a_twin_is_an_error(monkeypatch):
    monkeypatch.delitem(plain.TWINS, "adaptive_kl")
    log_p = torch.zeros(1, 3).log_softmax(-1)
    with pytest.raises(ValueError, match="plain PyTorch has no adaptive_kl"):
        plain.written_by_hand(kd.adaptive_kl, log_p, log_p)


@pytest.mark.parametrize(("text", "rule"), [
    ("denze", "kd has no divergence called 'denze'"), ("jsd", "needs its parameters"),
    ("Hidden", "needs its parameters"),
])  # fmt: skip
def test_what_is_no_divergence_is_refused(text, rule):
    with pytest.raises(ValueError, match=rule):
        parse_divergence(text)


# --- bounds and guards ----------------------------------------------------------------------------


def test_lower_bounds_count_each_gemm_and_each_byte_once():
    n, v, s, t, k = SMOKE.tokens, SMOKE.vocab, SMOKE.student_hidden, SMOKE.teacher_hidden, 8
    flops = {"linear": 2 * n * v * (3 * s + t), "linear-sparse": 6 * n * v * s}
    flops |= {"cross-entropy": 6 * n * v * s}
    heads = 2 * 4 * (v + n) * s
    moved = {"dense": 12 * n * v, "dense-loaded": 12 * n * v, "sparse": 8 * n * v + 12 * n * k}
    moved |= {"linear": heads + 4 * (v + n) * t, "linear-sparse": heads + 12 * n * k}
    moved |= {"cross-entropy": heads + 8 * n, "selection": 4 * n * v + 12 * n * k}
    for suite in bench_losses.SUITES:
        assert suite.flops(SMOKE) == flops.get(suite.name, 0)
        assert suite.bytes(SMOKE, 4) == moved[suite.name]


def test_guard_counts_inputs_gradients_and_temporaries():
    for problem in bench_losses.problems("cpu", None, True):
        given = sum(t.nbytes for name, t in problem.suite.inputs(problem).items()
                    if name not in ("ids", "logprobs", "labels"))  # fmt: skip
        gradients = 4 * SMOKE.vocab * SMOKE.student_hidden
        gradients *= problem.suite.name in ("linear", "linear-sparse", "cross-entropy")
        wide = of(problem.suite, "pytorch").copies * 4 * SMOKE.tokens * SMOKE.vocab
        needed = problem.suite.memory(problem, of(problem.suite, "pytorch"))
        assert needed == given + gradients + wide
    (problem, _) = bench_training.problems("cuda", None, False)
    weights = 28 * 2 * problem.shape.teacher_hidden**2  # less than the teacher alone
    assert problem.suite.memory(problem, of(problem.suite, "kd")) > 2 * weights


@pytest.mark.parametrize("size", [8, 24, 80, 192])
def test_no_card_is_overfilled_and_what_does_not_fit_says_so(size, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: size << 30)
    monkeypatch.setattr(machine, "version_of", lambda package: "1.0")
    for problem in (p for module in MODULES for p in module.problems("cuda", None, False)):
        for implementation in problem.entrants():
            needed = problem.suite.memory(problem, implementation)
            if needed <= 0.7 * (size << 30):
                measure.guard(problem, implementation, "cuda")
                continue
            assert size < 24 or implementation.name not in ("kd", "bare GEMM")
            with pytest.raises(measure.NotMeasured, match=r"needs about .* GiB of .* GiB free"):
                measure.guard(problem, implementation, "cuda")


def test_triton_peers_need_a_gpu_and_an_absent_package_is_named(monkeypatch):
    problem = Problem(bench_losses.DENSE, SMOKE)
    with pytest.raises(measure.NotMeasured, match="nowhere is not installed"):
        absent = dataclasses.replace(of(problem.suite, "trl gkd"), package="nowhere")
        measure.guard(problem, absent, "cpu")
    monkeypatch.setattr(machine, "version_of", lambda package: "1.0")
    with pytest.raises(measure.NotMeasured, match="needs a GPU"):
        measure.guard(problem, of(problem.suite, "liger jsd"), "cpu")


@pytest.mark.skipif(measure.reset_peak("cpu") is None, reason="needs Linux with glibc")
def test_peak_memory_sees_what_was_freed_in_the_step_and_not_before():
    kept = [torch.ones(100_000, dtype=torch.uint8) for _ in range(1000)]
    held = kept[::2]  # the allocator keeps the pages between those
    del kept

    def extra(function):
        def step():
            function()
            return torch.zeros(()), {}

        return measure.peak_of(step, {}, "cpu")["extra_memory"]

    assert (60 << 20) < extra(lambda: torch.ones(64 << 20, dtype=torch.uint8)) < (70 << 20)
    many = extra(lambda: [torch.ones(100_000, dtype=torch.uint8) for _ in held])
    assert (40 << 20) < many < (60 << 20)
    returned = torch.ones(32 << 20, dtype=torch.uint8)
    found = measure.peak_of(lambda: (returned, {"x": returned.clone()}), {}, "cpu")
    assert found["returned_memory"] == 32 << 20 and found["extra_memory"] < (4 << 20)
