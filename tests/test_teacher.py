"""Training the small teacher: the loss against its formula, determinism, reuse, and that it learns."""

import json

import pytest
import torch
from tiny import NETWORK, SHAPE, random_batch, tiny_config, tiny_denoiser

from dmd2_fast.config import load_config
from dmd2_fast.data import Batch, prepare_digits, read_all
from dmd2_fast.errors import ConfigError, UserError
from dmd2_fast.networks import load_denoiser
from dmd2_fast.random import NoiseKey, philox_normal, philox_uniform
from dmd2_fast.teacher import drop_labels, teacher_step_loss, train_teacher, training_times

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


@pytest.mark.parametrize(("schedule", "prediction_type"), [("ddpm", "epsilon"), ("rectified_flow", "flow")])
def test_other_schedules_train_on_their_own_target(schedule, prediction_type):
    denoiser, batch = tiny_denoiser(0, schedule, prediction_type), random_batch(6)
    u = philox_uniform(batch.sample_ids, (1,), KEY.fork(4))[:, 0]
    n = philox_normal(batch.sample_ids, SHAPE, KEY.fork(5), torch.float32)
    t = denoiser.schedule.time(u)
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in denoiser.schedule.coefficients(t))
    output = denoiser.predict(alpha * batch.x0 + sigma * n, t, batch.condition)
    expected = ((output - (n if prediction_type == "epsilon" else n - batch.x0)) ** 2).mean()
    torch.testing.assert_close(teacher_step_loss(denoiser, batch, KEY, 0.0), expected)


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
