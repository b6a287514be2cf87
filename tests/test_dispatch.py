"""The operator library: registration, backend choice, torch.compile, the same bits twice, and a light import."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import coefficients, random_tensor

import dmd2_fast
from dmd2_fast import NoiseKey, backends, dispatch, use_backend

KEY = NoiseKey(3, 2, 5)
WORDS = (3, 2, 5)
IDS = torch.arange(2)
SHAPE = (2, 4, 3, 3)
ALPHA, SIGMA = coefficients(2)
FLOW = {"prediction_type": "flow"}


def image(seed, grad=False, dtype=torch.float32):
    return random_tensor(SHAPE, dtype, seed).requires_grad_(grad)


def vector(size, seed, grad=False):
    return random_tensor((size,), torch.float32, seed).requires_grad_(grad)


def operator_cases():
    """Arguments of every operator of the library, by its schema."""
    x, y, z = image(0), image(1), image(2)
    last = x.to(memory_format=torch.channels_last)
    stats = torch.tensor([[0.6, 1.2], [0.9, 0.7]])
    features, head = random_tensor((2, 8), torch.float32, 3), [vector(8, i) for i in (1, 2, 3)] + [vector(1, 4)]
    logits = random_tensor((2, 3), torch.float32, 5)
    one, f32, bf16 = torch.tensor(0.7), torch.float32, torch.bfloat16
    keyed = (None, *WORDS, IDS)
    return {
        "philox_normal": [(IDS, [3, 2], *WORDS, bf16)],
        "philox_uniform": [(IDS, [3, 2], *WORDS)],
        "add_noise": [(image(0, True), ALPHA, SIGMA, *keyed), (last, ALPHA, SIGMA, y, 0, 0, 0, None)],
        "add_noise_drawing": [(image(0, True), ALPHA, SIGMA, *WORDS, IDS)],
        "add_noise_backward": [(last, ALPHA)],
        "predict_x0": [(image(0, True), image(1, True), ALPHA, SIGMA, 2), (last, y, ALPHA, SIGMA, 1)],
        "predict_x0_backward": [(x, ALPHA, SIGMA, SIGMA, 3, None, bf16), (last, ALPHA, SIGMA, None, 0, f32, f32)],
        "renoise": [(image(0, True), image(1, True), ALPHA, SIGMA, ALPHA, SIGMA, None, 1, *WORDS, IDS)],
        "dmd_loss": [
            (image(0, True), x, y, z, None, ALPHA, SIGMA, 0, 1.0, None, 1e-6),
            (last, x, y, z, y, ALPHA, SIGMA, 0, 2.0, SIGMA, 1e-6),
        ],
        "dmd_loss_backward": [(one, last, SIGMA)],
        "denoising_loss": [(image(0, True), y, ALPHA, SIGMA, None, 0, *WORDS, IDS, SIGMA)],
        "denoising_loss_backward": [(one, last, bf16)],
        "gan_generator_loss": [(vector(5, 0, True),)],
        "gan_generator_loss_backward": [(one, logits)],
        "gan_discriminator_loss": [(vector(5, 0, True), vector(3, 1, True))],
        "gan_discriminator_loss_backward": [(one, logits, logits.t())],
        "gan_head_loss": [
            (features.clone().requires_grad_(), *(t.clone().requires_grad_() for t in head), 2, -1, 1e-5)
        ],
        "gan_head_loss_backward": [(one, None, features, *head, stats[:, :1], stats, stats)],
        "r1_perturb": [(image(0, True), SIGMA, *keyed), (last, SIGMA, y, 0, 0, 0, None)],
        "r1_perturb_out": [(x, SIGMA, *keyed, torch.zeros(4, *SHAPE[1:]))],
        "r1_perturb_backward": [(last,)],
        "r1_penalty": [(logits.clone().requires_grad_(), (logits * 2).requires_grad_(), SIGMA)],
        "r1_penalty_backward": [(one, logits, logits * 2, SIGMA)],
        "group_norm_silu": [
            (image(0, True), vector(4, 1, True), vector(4, 2, True), 2, 1e-5),
            (last, vector(4, 1), vector(4, 2), 2, 1e-5),
        ],
        "group_norm_silu_backward": [(y, last, vector(4, 1), vector(4, 2), stats, stats)],
    }


CASES = [(name, i) for name, cases in operator_cases().items() for i in range(len(cases))]


def test_every_operator_has_a_case():
    assert set(operator_cases()) == set(dispatch.OPERATORS)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_opcheck(name, index):
    arguments = operator_cases()[name][index]
    torch.library.opcheck(getattr(torch.ops.dmd2_fast, name).default, arguments)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the arguments are on the CPU: interpreter only")
@pytest.mark.parametrize(("name", "index"), CASES)
def test_kernels_return_what_the_fakes_say_and_write_nothing_else(name, index):
    operator = getattr(torch.ops.dmd2_fast, name).default
    with dmd2_fast.use_backend("triton"):
        torch.library.opcheck(operator, operator_cases()[name][index], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("name", "index"), CASES)
def test_the_same_bits_twice(name, index):
    runs = []
    for _ in range(2):
        arguments = operator_cases()[name][index]
        outputs = getattr(torch.ops.dmd2_fast, name)(*arguments)
        runs.append(outputs if isinstance(outputs, tuple) else (arguments[-1] if outputs is None else outputs,))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def public_calls():
    """Every public operator as a function of a differentiable image and a key."""
    settings = {"alpha": ALPHA, "sigma": SIGMA, **FLOW}
    y, weight, projection = image(1), torch.linspace(0.5, 1, 4), torch.linspace(-1, 1, 4)[None]

    def features(x):
        return x.mean((2, 3))

    def keyed(key):
        return {"key": key, "sample_ids": IDS}

    return {
        "philox_normal": lambda x, key: x * dmd2_fast.philox_normal(IDS, SHAPE[1:], key),
        "philox_uniform": lambda x, key: x * dmd2_fast.philox_uniform(IDS, SHAPE[1:], key),
        "add_noise": lambda x, key: sum(dmd2_fast.add_noise(x, ALPHA, SIGMA, **keyed(key), return_noise=True)),
        "predict_x0": lambda x, key: dmd2_fast.predict_x0(y, x, ALPHA, SIGMA, **FLOW),
        "renoise": lambda x, key: dmd2_fast.renoise(y, x, ALPHA, SIGMA, ALPHA, SIGMA, **FLOW, **keyed(key)),
        "dmd_loss": lambda x, key: dmd2_fast.dmd_loss(x, y, y, y * 2, y * 3, guidance_scale=2.0, **settings),
        "denoising_loss": lambda x, key: dmd2_fast.denoising_loss(x, y, **settings, **keyed(key)),
        "gan_generator_loss": lambda x, key: dmd2_fast.gan_generator_loss(x),
        "gan_discriminator_loss": lambda x, key: dmd2_fast.gan_discriminator_loss(x, x[:1]),
        "gan_head_loss": lambda x, key: sum(
            dmd2_fast.gan_head_loss(features(x), weight, weight, projection, weight[:1], 2, sign=1)
        ),
        "r1_perturb": lambda x, key: dmd2_fast.r1_perturb(x, 0.1, **keyed(key)),
        "r1_penalty": lambda x, key: dmd2_fast.r1_penalty(x, y, 0.1),
        "group_norm_silu": lambda x, key: dmd2_fast.group_norm_silu(x, weight, weight, 2),
    }


def test_every_public_operator_is_compiled_below():
    others = {"NoiseKey", "backends", "use_backend"}
    assert set(public_calls()) == set(dmd2_fast.__all__) - others


def values_and_gradient(call, key):
    x = image(0, True)
    out = call(x, key)
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


@pytest.mark.parametrize(
    ("name", "compiler"), [(n, "aot_eager") for n in public_calls()] + [("denoising_loss", "inductor")]
)
def test_compile(name, compiler):
    torch._dynamo.reset()
    call = public_calls()[name]
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    for expected, ours in zip(values_and_gradient(call, KEY), values_and_gradient(compiled, KEY), strict=True):
        assert torch.allclose(expected, ours, rtol=1e-6, atol=1e-6)


def test_a_compiled_step_is_not_compiled_again_for_every_key():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = public_calls()["add_noise"]
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for step in range(8):
        expected, ours = (f(image(0), KEY.at(step)) for f in (call, compiled))
        assert torch.equal(expected, ours)
    assert counter.frame_count <= 3


def test_use_backend_as_a_call_and_as_a_context_manager():
    with use_backend("auto"):
        with use_backend("reference"):
            assert backends()["r1_perturb"]["cpu"] == ("reference", "asked for")
            use_backend("auto")
            assert backends()["r1_perturb"]["cpu"].reason != "asked for"
            use_backend("reference")
        assert backends()["r1_perturb"]["cpu"].reason != "asked for"
        with use_backend("reference"):
            with use_backend("auto"):
                pass
            assert backends()["r1_perturb"]["cpu"].reason == "asked for"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backends()["r1_perturb"]["cpu"].reason != "asked for"


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="use_backend: got 'cuda', expected"):
        use_backend("cuda")


@pytest.fixture
def fresh(monkeypatch):
    """Forget what was looked for and logged, before and after."""

    def forget():
        for cached in (dispatch._choose, dispatch._fast, dispatch._find_triton, dispatch._load_extension):
            cached.cache_clear()
        dispatch._logged.clear()

    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


def test_a_backend_that_is_not_installed_is_refused_with_the_way_to_get_it(fresh):
    fresh.setattr(dispatch, "EXTENSION", Path("nowhere.so"))
    fresh.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"cpp.*not built.*pip install --no-build-isolation"):
        use_backend("cpp")
    with pytest.raises(RuntimeError, match=r"triton is not installed: `pip install"):
        use_backend("triton")
    table = backends()
    assert "not built" in table["r1_perturb"]["cpu"].reason
    assert "not installed" in table["r1_perturb"]["cuda"].reason
    assert all(choice.backend == "reference" for row in table.values() for choice in row.values())


def test_a_fallback_is_logged_once_and_stands_in_the_table(fresh, caplog):
    fresh.setattr(dispatch, "missing", lambda backend: "")
    fresh.setattr(dispatch, "_fast", lambda name, backend: f"{name} has no {backend} implementation")
    with caplog.at_level(logging.INFO, "dmd2_fast"), use_backend("cpp"):
        for _ in range(2):
            dmd2_fast.gan_generator_loss(torch.zeros(3))
        choice = backends()["gan_generator_loss"]["cpu"]
        assert choice == ("reference", "gan_generator_loss has no cpp implementation")
        assert backends()["gan_generator_loss"]["cuda"].reason == "the cpp backend takes CPU tensors, not cuda"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cpp asked for, reference runs: gan_generator_loss has no cpp" in caplog.text


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_adding_an_implementation_is_one_line(fresh, backend, caplog):
    """An entry of the table is reached with the schema's arguments, but for f64, which stays with the reference."""
    calls = []

    def fast(logits):
        calls.append(logits.dtype)
        return logits.new_full((), 7.0)

    real = dispatch._fast
    fresh.setattr(dispatch, "missing", lambda name: "")
    fresh.setattr(
        dispatch, "_fast", lambda name, b: fast if (name, b) == ("gan_generator_loss", backend) else real(name, b)
    )
    with use_backend(backend):
        assert dmd2_fast.gan_generator_loss(torch.zeros(3)) == 7.0
        assert dmd2_fast.gan_generator_loss(torch.zeros(3, dtype=torch.float64)) < 1
        assert backends()["gan_generator_loss"]["cpu"] == (backend, "asked for")
    assert calls == [torch.float32]
    assert "takes no float64" in caplog.text
    with use_backend("auto"):
        device = {"cpp": "cpu", "triton": "cuda"}[backend]
        assert backends()["gan_generator_loss"][device] == (backend, "auto")
    fresh.undo()


@pytest.mark.skipif(bool(dispatch.missing("cpp")), reason="the C++ extension is not built")
def test_auto_runs_the_extension_where_it_has_the_operator():
    with use_backend("auto"):
        assert backends()["r1_perturb"]["cpu"] == ("cpp", "auto")


LIGHT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "nvidia", "deepspeed", "diffusers", "transformers", "apex", "flash_attn"}:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
import torch
before = set(sys.modules)
import dmd2_fast
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert new <= {"dmd2_fast"} | set(sys.stdlib_module_names), new
key, one = dmd2_fast.NoiseKey(0), torch.ones(2)
x = dmd2_fast.add_noise(torch.zeros(2, 3), one, one, key=key, sample_ids=torch.arange(2))
assert x.shape == (2, 3)
assert not torch.cuda.is_initialized()
"""


def test_import_is_light_and_needs_nothing_but_torch():
    root = Path(dmd2_fast.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", LIGHT], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_cpp_takes_cuda_tensors_where_the_extension_has_them(fresh):
    """An extension without CUDA code refuses them; with it, the operators that have it are chosen, when asked for."""
    fresh.setattr(dispatch, "missing", lambda backend: "")
    fresh.setattr(dispatch, "_fast", lambda name, backend: len)
    fresh.setattr(dispatch, "_has_cuda", lambda name: name == "r1_perturb")
    with use_backend("cpp"):
        table = backends()
    assert table["r1_perturb"]["cuda"].backend == "cpp"
    assert table["add_noise"]["cuda"] == ("reference", "the cpp backend takes CPU tensors, not cuda")
    assert backends()["r1_perturb"]["cuda"].backend == "triton"
