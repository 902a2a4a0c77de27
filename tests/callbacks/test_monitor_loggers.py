"""Real loggers: what arrives is what was measured, and pictures arrive where they are taken."""

import csv

import pytest
import torch
from contract.training import fit
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_plasticity import PlasticityMonitor
from lightning_plasticity import metrics as M

PNG = b"\x89PNG"
NAMES = {"DeadUnits", "WeightNorm", "GradientCovariance"}


def monitored(logger, **options):
    monitor = PlasticityMonitor([M.DeadUnits(), M.WeightNorm(), M.GradientCovariance()], **options)
    fit(monitor, logger=logger, max_epochs=2, log_every_n_steps=1)
    return monitor


def expected(monitor):
    """Each number that should have been logged, by name and step."""
    numbers = {}
    for name, records in monitor.history.items():
        for step, values in records:
            mean = torch.tensor(list(values.values()), dtype=torch.float64).mean().item()
            numbers[f"plasticity/{name}", step] = values.get("", mean)
            numbers |= {(f"plasticity/{name}/{layer}", step): value for layer, value in values.items() if layer}
    assert {step for _, step in numbers} == {5, 11}
    assert ("plasticity/DeadUnits/net.first", 5) in numbers
    return numbers


def is_png(path):
    return path.read_bytes().startswith(PNG)


def test_csv_and_pictures_beside_it(tmp_path):
    logger = CSVLogger(tmp_path)
    monitor = monitored(logger)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["plasticity/DeadUnits"]]
    written = {
        (name, int(row["step"])): float(value) for row in rows for name, value in row.items() if "plasticity/" in name
    }
    assert written == expected(monitor)
    pictures = list(tmp_path.glob("**/plasticity/*.png"))
    assert {path.stem for path in pictures} == NAMES
    assert all(map(is_png, pictures))


def test_no_pictures_if_none_are_wanted(tmp_path):
    monitored(CSVLogger(tmp_path), figures=False)
    assert not list(tmp_path.glob("**/*.png"))


# `pytest.warns` gives on what Lightning's own modules have said, under another module's name.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
def test_without_matplotlib_numbers_are_logged_and_a_warning_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_plasticity.monitoring.loop._can_draw", lambda: False)
    with pytest.warns(UserWarning, match=r"matplotlib is not installed. Install it with .*\[plot\]"):
        monitor = monitored(CSVLogger(tmp_path))
    assert expected(monitor)
    assert list(tmp_path.glob("**/metrics.csv"))
    assert not list(tmp_path.glob("**/*.png"))


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    monitor = monitored(logger)
    events = EventAccumulator(logger.log_dir).Reload()
    written = {
        (name, event.step): event.value
        for name in events.Tags()["scalars"]
        if name.startswith("plasticity/")
        for event in events.Scalars(name)
    }
    assert written == pytest.approx(expected(monitor), rel=1e-6)  # TensorBoard keeps single precision
    assert set(events.Tags()["images"]) == {f"plasticity/{name}" for name in NAMES}
    for name in NAMES:
        images = events.Images(f"plasticity/{name}")
        assert [image.step for image in images] == [5, 11]
        assert all(image.encoded_image_string.startswith(PNG) for image in images)


def offline_history(path):
    """The rows of a W&B run that was written offline: records in blocks of 32 KiB, as in LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if position % 32768 > 32768 - 7:  # no room for a header: the rest of the block is empty
            position += 32768 - position % 32768
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        whole += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                yield {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}


def test_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    monitor = monitored(WandbLogger(save_dir=tmp_path, offline=True))
    wandb.finish()
    wandb.teardown()  # its service has then written everything
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    written = {
        (name, int(row["trainer/global_step"])): float(value)
        for row in offline_history(path)
        for name, value in row.items()
        if name.startswith("plasticity/")
    }
    assert written == expected(monitor)
    pictures = list(tmp_path.glob("wandb/offline-run-*/files/media/images/plasticity_figures/*.png"))
    assert sorted(path.name.split("_")[0] for path in pictures) == sorted([*NAMES] * 2)
    assert all(map(is_png, pictures))


# MLflow's store uses it with SQLAlchemy 2.1.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning")
@pytest.mark.parametrize("store", ["sqlite:///{}/mlflow.db", "file:{}/mlruns"])
def test_mlflow(tmp_path, monkeypatch, store):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=store.format(tmp_path), artifact_location=f"file:{tmp_path}/artifacts")
    monitor = monitored(logger)
    numbers = expected(monitor)
    if store.startswith("file"):  # where a name cannot be a folder of names, too
        of_all = {name for name, _ in numbers if f"{name}/" in {n.rsplit("/", 1)[0] + "/" for n, _ in numbers}}
        numbers = {(f"{n}/all" if n in of_all else n, step): number for (n, step), number in numbers.items()}
    names = {name for name, _ in numbers}
    history = {name: logger.experiment.get_metric_history(logger.run_id, name) for name in names}
    assert {(name, m.step): m.value for name, records in history.items() for m in records} == numbers
    pictures = list(tmp_path.glob("artifacts/**/plasticity/*.png"))
    assert {path.stem for path in pictures} == NAMES
    assert all(map(is_png, pictures))
