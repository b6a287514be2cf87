"""Training the small teacher: the loss against its formula, determinism, reuse, and that it learns."""

import json

import pytest
import torch
from tiny import NETWORK, SHAPE, random_batch, tiny_config, tiny_denoiser

from dmd2_fast.config import TeacherTrainingConfig, TimeSamplingConfig, load_config
from dmd2_fast.data import Batch, prepare_digits, read_all
from dmd2_fast.errors import ConfigError, UserError
from dmd2_fast.networks import build_denoiser, load_denoiser
from dmd2_fast.ops._common import PREDICTION_TYPES
from dmd2_fast.random import NoiseKey, philox_normal, philox_uniform
from dmd2_fast.schedules import SCHEDULES, TimeSampling
from dmd2_fast.teacher import drop_labels, teacher_settings, teacher_step_loss, train_teacher, training_times

KEY = NoiseKey(5, step=9)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    prepare_digits(folder / "data")
    return folder


def config_in(digits, tmp_path, **training):
    settings = tiny_config(tmp_path, teacher={"training": training})
    settings["dmd2_fast"]["data"]["path"] = str(digits / "data")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return load_config(tmp_path / "config.json")


def test_edm_loss_is_the_papers():
    """Karras et al. 2022, eq. 8 with table 1: ln sigma ~ N(-1.2, 1.2^2), lambda = (sigma^2 + s^2) / (sigma s)^2."""
    denoiser, batch = tiny_denoiser(), random_batch(6)
    sigma = (-1.2 + 1.2 * philox_normal(batch.sample_ids, (1,), KEY.fork(4), torch.float32)[:, 0]).exp()
    n = philox_normal(batch.sample_ids, SHAPE, KEY.fork(5), torch.float32)
    data = denoiser.schedule.sigma_data
    output = denoiser.predict(batch.x0 + sigma.reshape(-1, 1, 1, 1) * n, sigma, batch.condition)
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    expected = (weight.reshape(-1, 1, 1, 1) * (output - batch.x0) ** 2).mean()
    torch.testing.assert_close(training_times(denoiser, batch, KEY), sigma)
    torch.testing.assert_close(teacher_step_loss(denoiser, batch, KEY, 0.0), expected)


TARGETS = {
    "epsilon": lambda x0, n, alpha, sigma: n,
    "sample": lambda x0, n, alpha, sigma: x0,
    "v_prediction": lambda x0, n, alpha, sigma: alpha * n - sigma * x0,
    "flow": lambda x0, n, alpha, sigma: n - x0,
}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_trains_on_every_target_with_weight_one(schedule, prediction_type):
    """Karras' x0 alone has another weight: see the test above."""
    if (schedule, prediction_type) == ("karras", "sample"):
        return
    denoiser, batch = tiny_denoiser(0, schedule, prediction_type), random_batch(6)
    n = philox_normal(batch.sample_ids, SHAPE, KEY.fork(5), torch.float32)
    if schedule == "karras":
        t = (-1.2 + 1.2 * philox_normal(batch.sample_ids, (1,), KEY.fork(4), torch.float32)[:, 0]).exp()
    else:
        t = denoiser.schedule.time(philox_uniform(batch.sample_ids, (1,), KEY.fork(4))[:, 0])
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in denoiser.schedule.coefficients(t))
    output = denoiser.predict(alpha * batch.x0 + sigma * n, t, batch.condition)
    expected = ((output - TARGETS[prediction_type](batch.x0, n, alpha, sigma)) ** 2).mean()
    torch.testing.assert_close(teacher_step_loss(denoiser, batch, KEY, 0.0), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["uniform", "log_normal", "shifted"])
def test_configured_time_sampling_draws_from_the_uniform_of_its_stream(schedule, kind):
    denoiser, batch = tiny_denoiser(0, schedule), random_batch(6)
    settings = {"kind": kind, "mean": 0.3, "std": 0.7, "shift": 2.0}
    u = philox_uniform(batch.sample_ids, (1,), KEY.fork(4))[:, 0]
    expected = TimeSampling(**settings).draw(denoiser.schedule, u)
    assert torch.equal(training_times(denoiser, batch, KEY, TimeSamplingConfig(**settings)), expected)


@pytest.mark.parametrize(
    ("changes", "prediction_type", "preconditioning", "sigma_data"),
    [
        ({}, "sample", "edm", 0.61),
        ({"sigma_data": 0.75}, "sample", "edm", 0.75),
        ({"preconditioning": "none"}, "sample", "none", 0.61),
        ({"prediction_type": "epsilon"}, "epsilon", "none", None),
        ({"schedule": "ddpm"}, "epsilon", "none", None),
        ({"schedule": "ddpm", "prediction_type": "sample"}, "sample", "none", None),
        ({"schedule": "rectified_flow"}, "flow", "none", None),
        ({"schedule": "rectified_flow", "prediction_type": "v_prediction"}, "v_prediction", "none", None),
    ],
)
def test_settings_left_open_are_the_schedules_usual(changes, prediction_type, preconditioning, sigma_data):
    """And the data's deviation is measured where it is read."""
    settings = teacher_settings(TeacherTrainingConfig(dict(NETWORK), **changes), lambda: torch.tensor(0.61))
    assert (settings["prediction_type"], settings["preconditioning"]) == (prediction_type, preconditioning)
    assert settings["schedule"]["kind"] == changes.get("schedule", "karras")
    assert settings["schedule"].get("sigma_data") == pytest.approx(sigma_data)
    assert build_denoiser(settings).prediction_type == prediction_type


def test_label_dropout_drops_that_share():
    denoiser, batch = tiny_denoiser(), random_batch(2000)
    labels = drop_labels(denoiser, batch, KEY, 0.25)["class_labels"]
    dropped = labels == 10
    assert abs(dropped.float().mean().item() - 0.25) < 0.03
    assert torch.equal(labels[~dropped], batch.condition["class_labels"][~dropped])


def test_teacher_is_made_once_and_whole(digits, tmp_path, capsys):
    config = config_in(digits, tmp_path)
    folder = train_teacher(config)
    assert sorted(path.name for path in tmp_path.iterdir() if "teacher" in path.name) == ["teacher"]
    first = load_denoiser(folder).state_dict()
    before = (folder / "denoiser.json").stat().st_mtime_ns
    train_teacher(config)
    assert "already" in capsys.readouterr().out and (folder / "denoiser.json").stat().st_mtime_ns == before
    train_teacher(config, fresh=True)
    again = load_denoiser(folder).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first), "the same seed gives the same teacher"
    with pytest.raises(ConfigError, match="of these settings"):
        train_teacher(config_in(digits, tmp_path, iterations=4))


def test_teacher_that_does_not_fit_the_data_is_refused(digits, tmp_path):
    with pytest.raises(ConfigError, match=r"width\) \(1, 8, 8\), and the teacher in .* takes \(4, 4, 4\)"):
        train_teacher(config_in(digits, tmp_path, patch_size=1))
    assert not (tmp_path / "teacher").exists()


def test_a_teacher_that_diverges_is_not_kept(digits, tmp_path):
    with pytest.raises(UserError, match="training has diverged"):
        train_teacher(config_in(digits, tmp_path, iterations=5, optimizer={"params": {"lr": 1e30}}))
    assert not (tmp_path / "teacher").exists()


def test_too_few_classes_are_refused(digits, tmp_path):
    with pytest.raises(ConfigError, match=r"labels up to 9, and .* knows 9 classes"):
        train_teacher(config_in(digits, tmp_path, network={**NETWORK, "num_class_embeds": 10}))


def test_sigma_data_is_measured_on_the_training_split(digits, tmp_path):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images = load_digits().images
    train, _ = train_test_split(images, test_size=360, random_state=0)
    folder = train_teacher(config_in(digits, tmp_path, iterations=1, sigma_data=None))
    measured = json.loads((folder / "denoiser.json").read_text())["schedule"]["sigma_data"]
    assert measured == pytest.approx((train / 8 - 1).std(), rel=1e-3)


def test_it_learns(digits, tmp_path):
    """150 steps beat what any network without input can do: the best constant image for each class."""
    config = config_in(digits, tmp_path, iterations=150, batch_size=32)
    denoiser = load_denoiser(train_teacher(config))
    images, labels = read_all(config.data.path, "test")
    batch = Batch(images, {"class_labels": labels}, torch.arange(len(images)))
    with torch.no_grad():
        loss = teacher_step_loss(denoiser, batch, KEY, 0.0)
    sigma = training_times(denoiser, batch, KEY)
    means = torch.stack([images[labels == label].mean(0) for label in range(10)])[labels]
    weight = denoiser.schedule.loss_weight(sigma, "sample").reshape(-1, 1, 1, 1)
    skip = denoiser.schedule.sigma_data**2 / (sigma**2 + denoiser.schedule.sigma_data**2)
    noise = philox_normal(batch.sample_ids, SHAPE, KEY.fork(5), torch.float32)
    untrained = skip.reshape(-1, 1, 1, 1) * (images + sigma.reshape(-1, 1, 1, 1) * noise)
    best = min((weight * (guess - images) ** 2).mean() for guess in (means, untrained))
    assert loss < 0.9 * best


SIGNAL_LEVELS = {"ddpm": [50, 300, 700], "karras": [0.1, 0.8, 5.0], "rectified_flow": [0.1, 0.45, 0.9]}


@pytest.fixture(scope="module")
def images(digits):
    return {split: read_all(digits / "data", split) for split in ("train", "test")}


def x0_error(denoiser, batch):
    """Root mean squared error of x0 from the prediction, by the definitions, over three noise levels."""
    squares = []
    for t in SIGNAL_LEVELS[denoiser.schedule.kind]:
        times = torch.full((len(batch),), t)
        a, s = (float(value[0]) for value in denoiser.schedule.coefficients(times))
        x_t = a * batch.x0 + s * philox_normal(batch.sample_ids, SHAPE, KEY, torch.float32)
        with torch.no_grad():
            p = denoiser.predict(x_t, times, batch.condition)
        x0 = {
            "epsilon": (x_t - s * p) / a,
            "sample": p,
            "v_prediction": (a * x_t - s * p) / (a**2 + s**2),
            "flow": (x_t - s * p) / (a + s),
        }[denoiser.prediction_type]
        squares.append(((x0 - batch.x0) ** 2).mean())
    return torch.stack(squares).mean().sqrt().item()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_and_prediction_learns(images, schedule, prediction_type):
    """Forty steps: less loss, and an x0 of held-out images that is nearer to them."""
    x, labels = images["train"]
    edm = (schedule, prediction_type) == ("karras", "sample")
    torch.manual_seed(0)
    denoiser = build_denoiser({
        "network": {"kind": "unet2d", "config": NETWORK, "patch_size": 2}, "schedule": {"kind": schedule},
        "prediction_type": prediction_type, "preconditioning": "edm" if edm else "none",
    })  # fmt: skip
    test = Batch(images["test"][0][:64], {"class_labels": images["test"][1][:64]}, torch.arange(64))

    def measures():
        with torch.no_grad():
            return teacher_step_loss(denoiser, test, KEY, 0.0).item(), x0_error(denoiser, test)

    before, optimizer = measures(), torch.optim.AdamW(denoiser.parameters(), lr=3e-3)
    for step in range(40):
        chosen = torch.arange(32 * step, 32 * (step + 1)) % len(x)
        batch = Batch(x[chosen], {"class_labels": labels[chosen]}, torch.arange(32))
        optimizer.zero_grad()
        teacher_step_loss(denoiser, batch, KEY.at(step), 0.0).backward()
        optimizer.step()
    after = measures()
    assert after[0] < 0.9 * before[0] and after[1] < 0.9 * before[1]
