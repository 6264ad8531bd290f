"""What the shipped phantom can do, held to its promise on 500 studies that it was not trained on."""

import pytest
import torch

from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2 import generate_reports, load_output_head
from sae_lens_maira.maira2.loading import checkpoint_fingerprint, load_config
from sae_lens_maira.phantom import generate_studies, phantom_path
from sae_lens_maira.phantom.measure import measure


@pytest.fixture(scope="module")
def score(phantom):
    return measure(phantom, generate_studies(500, seed=10_000), progress=False)


@pytest.mark.slow
def test_held_out_accuracy(score):
    """Greedy reports: findings at least 96 % on average, each 92 %, changes named in 85 %, boxes IoU 0.4."""
    assert score.mean_accuracy >= 0.96
    assert min(score.accuracy.values()) >= 0.92, score.accuracy
    assert score.change_accuracy >= 0.85
    assert score.box_iou >= 0.4


@pytest.mark.compat
def test_weights_are_small():
    """fp16 weights of at most 8 MB, and a tokenizer that both stacks read."""
    files = {file.name: file.stat().st_size for file in phantom_path().iterdir()}
    assert files["model.safetensors"] <= 8 * 2**20
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} <= set(
        files
    )


@pytest.mark.compat
def test_loaders_take_its_name():
    """ "phantom" is accepted wherever a checkpoint is named, in float32 unless asked otherwise."""
    hooked = HookedMaira2.from_pretrained("phantom")
    assert hooked.cfg.dtype == torch.float32
    assert load_config("phantom").to_dict() == load_config(phantom_path()).to_dict()
    assert load_output_head("phantom").lm_head.dtype == torch.float32
    assert checkpoint_fingerprint("phantom") == checkpoint_fingerprint(phantom_path())


@pytest.mark.compat
def test_reads_a_real_image(phantom):
    """The chest image of pydicom-data goes through processor and model; the phantom cannot understand it."""
    pydicom_data = pytest.importorskip("pydicom.data")
    image = pydicom_data.get_testdata_file("RG1_UNCR.dcm", download=False)
    assert image is not None, "install pydicom-data"
    from sae_lens_maira.studies import Study

    study = Study(study_id="image", patient_id="image", frontal=image)
    (report,) = generate_reports(phantom.model, phantom.processor, study)
    assert report.text.strip()
