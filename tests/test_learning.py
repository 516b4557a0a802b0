"A short training on the real scenes beats chance by a wide margin: everything works together."

import pytest

from speechimg.core import Config, data_dir, read_json
from speechimg.train import train

# Small enough for two minutes on two cores, features included; what ships is trained longer.
QUICK = Config(
    width=96,
    dim=64,
    heads=4,
    speech_depth=1,
    image_depth=1,
    fusion_depth=1,
    batch_size=64,
    steps=300,
    learning_rate=2e-3,
    warmup_steps=20,
    student_steps=300,
    queue_size=0,
    siblings=0.0,
    sim_start_step=280,
    evaluate_every=300,
    checkpoint_every=300,
)
CAPTIONS = 600
AT_LEAST = 4  # times chance, recall at 10 of both directions


@pytest.mark.skipif(not (data_dir() / "scenes.zip").exists(), reason="needs data/scenes.zip")
def test_quick_training_beats_chance(tmp_path):
    out = train(QUICK, "scenes", tmp_path, limit=CAPTIONS, progress=False)
    metrics = read_json(out / "metrics.json")
    recall, recordings = metrics["validation"]["coarse"], metrics["recordings"]["val"]
    assert recordings == 600
    for direction in (
        "speech_to_image",
        "image_to_speech",
    ):  # 1 of 300 pictures; 2 of 600 recordings
        chance = 100 * 10 / 300
        assert recall[direction]["10"] > AT_LEAST * chance, (recall, chance)
