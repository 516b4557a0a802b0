"data: decoded once, kept safely, batched so that padding and neighbours do not matter."

import json
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
import zipfile
from types import SimpleNamespace as Simple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from miniature import image_bytes, make_corpus, wav_bytes
from PIL import Image
from test_core import complaint

from speechimg import data
from speechimg.core import InputError, memory_limit
from speechimg.corpora import load_corpus
from speechimg.data import Batch, Features, augment, collate, epoch_batches, speech_mask
from speechimg.files.cache import FeatureCache, sha256
from speechimg.files.decode import decode_audio, decode_image


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Sound


@given(
    st.integers(10, 40_000),
    st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000]),
    st.integers(1, 3),
)
def test_any_rate_and_any_channels_give_one_kind(n, rate, channels):
    rng = np.random.default_rng(n)
    wave = decode_audio(
        wav_bytes(rng.uniform(-1, 1, (n, channels)).astype(np.float32), rate), "a.wav"
    )
    assert wave.dtype == torch.float32 and wave.dim() == 1 and wave.abs().max() <= 1
    assert abs(len(wave) - n * 16_000 / rate) <= 1


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_the_tone_stays_the_tone(rate):
    time = np.arange(2 * rate) / rate
    wave = decode_audio(wav_bytes(0.5 * np.sin(2 * np.pi * 1_000 * time), rate), "a.wav")
    torch.testing.assert_close(
        wave[1_000:-1_000],
        0.5 * torch.sin(2 * torch.pi * 1_000 * torch.arange(32_000) / 16_000)[1_000:-1_000],
        atol=2e-3,
        rtol=0,
    )


def test_the_mean_of_two_channels():
    wave = decode_audio(wav_bytes(np.stack([np.full(100, 0.5), np.full(100, -0.25)], 1)), "a.wav")
    torch.testing.assert_close(wave, torch.full((100,), 0.125))


@pytest.mark.parametrize("seconds", [0.1, 1, 3.5])
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_cutting(seconds, rate):
    whole = wav_bytes(np.sin(np.arange(2 * rate) / 50), rate)
    assert len(decode_audio(whole, "a.wav", seconds)) == min(32_000, int(seconds * 16_000))


# Features: a corpus of arrays, front ends that count


class Frames:
    "Frames of 10 ms: their mean loudness, and their number."

    params, calls = "frames 1", 0

    def __call__(self, wave):
        type(self).calls += 1
        frames = wave[: len(wave) // 160 * 160].view(-1, 160).abs().mean(1)
        return torch.stack([frames, torch.arange(len(frames)) / 100], 1).half().numpy()


class Tiny:
    params = "tiny 1"

    def __call__(self, image):
        return np.asarray(image.resize((24, 24))).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return load_corpus(
        make_corpus(tmp_path_factory.mktemp("data") / "mini", 12, 2, zip=True), "train"
    )


@pytest.fixture
def features(corpus, tmp_path):
    return Features(corpus, Frames(), Tiny(), FeatureCache(tmp_path), progress=False)


def test_features_say_what_the_corpus_says(corpus, features):
    assert len(features) == len(corpus.captions) == 24 and len(features.image) == 12
    assert features.uttids == [caption.uttid for caption in corpus.captions] and torch.equal(
        features.image_of, corpus.image_of
    )
    assert torch.equal(features.ids, corpus.image_of)  # ids are the numbers in the manifest
    assert features.groups.tolist() == [
        corpus.pictures[caption.image].group for caption in corpus.captions
    ]
    assert features.levels.tolist() == [
        len(corpus.pictures[caption.image].concepts) for caption in corpus.captions
    ]
    assert (
        features.lengths.tolist()
        == [len(frames) for frames in features.speech]
        == [len(corpus.load_wave(row)) // 160 for row in range(24)]
    )
    np.testing.assert_array_equal(features.speech[5], Frames()(corpus.load_wave(5)))
    np.testing.assert_array_equal(features.image[7], Tiny()(corpus.load_picture(7)))
    assert (
        features.skipped == []
        and features.captions == list(range(24))
        and features.pictures == list(range(12))
    )


@pytest.mark.parametrize(
    "picture, expected",
    [
        (Simple(scene={"kind": "count", "nouns": ["bee"], "relation": 3}, concepts=["bee"]), 3),
        (
            Simple(
                scene={"kind": "mixed", "nouns": ["bee", "cow"], "relation": 3},
                concepts=["bee", "cow"],
            ),
            4,
        ),
        (
            Simple(
                scene={"kind": "pair", "nouns": ["a", "b"], "relation": "left"}, concepts=["a", "b"]
            ),
            2,
        ),
        (Simple(scene=None, concepts=["bee"]), 1),
        (Simple(scene=None, concepts=[]), 0),
    ],
)
def test_levels(picture, expected):
    assert data.level(picture) == expected


def test_the_second_time_nothing_is_computed_and_each_file_is_read_once(corpus, features):
    read, before = [], Frames.calls
    again = Simple(
        **{name: getattr(corpus, name) for name in ("pictures", "captions", "root")},
        read=lambda path: read.append(path) or corpus.read(path),
    )
    other = Features(again, Frames(), Tiny(), features.cache, progress=False)
    assert Frames.calls == before and len(read) == len(set(read)) == 36
    assert all(
        (a == b).all() and a.dtype == b.dtype == np.float16
        for a, b in zip(features.speech, other.speech)
    )
    Features(
        again, Frames(), Tiny(), features.cache, max_seconds=0.1, progress=False
    )  # other parameters are other features
    assert Frames.calls == before + 24


def test_a_broken_picture_takes_its_captions_with_it(corpus, tmp_path):
    broken = {corpus.pictures[2].path, corpus.captions[10].wav}
    spoilt = Simple(
        pictures=corpus.pictures,
        captions=corpus.captions,
        root="mini",
        skipped=["before"],
        read=lambda path: b"oops" if path in broken else corpus.read(path),
    )
    features = Features(
        spoilt, Frames(), Tiny(), FeatureCache(tmp_path), on_error="skip", progress=False
    )
    assert (
        features.captions == [row for row in range(24) if row not in (4, 5, 10)]
        and 2 not in features.pictures
    )
    assert (
        features.skipped[0] == "before"
        and len(features.skipped) == 3
        and all(any(name in line for line in features.skipped) for name in broken)
    )
    for row, caption in enumerate(features.captions):
        assert features.ids[row] == corpus.image_of[caption]
        np.testing.assert_array_equal(
            features.image[features.image_of[row]],
            Tiny()(corpus.load_picture(int(corpus.image_of[caption]))),
        )
    assert corpus.pictures[2].path in complaint(
        Features, spoilt, Frames(), Tiny(), FeatureCache(tmp_path), progress=False
    )
    nothing = Simple(
        pictures=corpus.pictures, captions=corpus.captions, root="mini", read=lambda path: b""
    )
    assert "mini" in complaint(
        Features, nothing, Frames(), Tiny(), FeatureCache(tmp_path), on_error="skip", progress=False
    )
    assert "on_error" in complaint(
        Features, corpus, Frames(), Tiny(), FeatureCache(tmp_path), on_error="ignore"
    )


def test_a_clip_shorter_than_a_frame(corpus, tmp_path):
    short = Simple(
        pictures=corpus.pictures,
        captions=corpus.captions,
        root="mini",
        read=lambda path: wav_bytes(np.ones(100)) if "000-0.wav" in path else corpus.read(path),
    )
    assert "too short" in complaint(
        Features, short, Frames(), Tiny(), FeatureCache(tmp_path), progress=False
    )
    assert (
        len(
            Features(
                short, Frames(), Tiny(), FeatureCache(tmp_path), on_error="skip", progress=False
            )
        )
        == 23
    )


def test_what_does_not_fit_into_memory_is_read_again(corpus, features):
    """Whatever the limit: the same lengths, the same batches. The mutants: a file that went away,
    and one that was damaged, are named.
    """
    half = (
        sum(image.nbytes for image in features.image)
        + sum(frames.nbytes for frames in features.speech) // 2
    )
    for memory, kept in ((0, 0), (half, None), (float("inf"), 36)):
        other = Features(corpus, Frames(), Tiny(), features.cache, progress=False, memory=memory)
        held = sum(
            not isinstance(one, str) for side in (other.image, other.speech) for one in side.held
        )
        assert held == kept if kept is not None else 12 < held < 36
        assert other.lengths.tolist() == features.lengths.tolist() and len(other.image) == 12
        assert (
            sum(
                one.nbytes
                for side in (other.image, other.speech)
                for one in side.held
                if not isinstance(one, str)
            )
            <= memory
        )
        for rows in ([0, 5, 23], list(range(24))):
            one, two = collate(features, rows), collate(other, rows)
            assert (
                all(
                    torch.equal(getattr(one, name), getattr(two, name))
                    for name in ("speech", "speech_lengths", "image", "ids")
                )
                and one.uttids == two.uttids
            )
    other = Features(corpus, Frames(), Tiny(), features.cache, progress=False, memory=0)
    before = Frames.calls
    for name in list(features.cache.folder.rglob("*.npz")):
        name.write_bytes(b"spoilt")
    assert "start again" in complaint(collate, other, [3]) and Frames.calls == before
    assert torch.equal(
        collate(
            Features(corpus, Frames(), Tiny(), features.cache, progress=False, memory=0), [3]
        ).speech,
        collate(features, [3]).speech,
    )


def test_the_limit_of_memory(monkeypatch):
    monkeypatch.delenv("SPEECHIMG_MEMORY", raising=False)
    assert memory_limit() == 8e9
    for text, expected in (("0", 0), ("1.5", 1.5e9), ("inf", float("inf"))):
        monkeypatch.setenv("SPEECHIMG_MEMORY", text)
        assert memory_limit() == expected
    for text in ("-1", "nan", "8 GB"):
        monkeypatch.setenv("SPEECHIMG_MEMORY", text)
        assert text in complaint(memory_limit)


def test_pictures_alone(corpus, tmp_path):
    gallery = Features(
        Simple(pictures=corpus.pictures, captions=[], root="g", read=corpus.read),
        None,
        Tiny(),
        FeatureCache(tmp_path),
        progress=False,
    )
    assert len(gallery) == 0 and len(gallery.image) == 12 and gallery.ids.shape == (0,)


# The cache

ARRAY = (
    np.random.default_rng(0).standard_normal((800, 5)).astype(np.float16)
)  # more than is read at one go


def stored(cache):
    cache.get(sha256("key"), "params", lambda: ARRAY)
    return cache.path(sha256("key"), "params")


def check_damage(make_cache, folder, positions, cuts):
    "Whatever bit is turned and wherever the file is cut, the right array comes back."
    cache = make_cache(folder)
    path = stored(cache)
    whole = path.read_bytes()
    for position in positions:
        damaged = bytearray(whole)
        damaged[position // 8 % len(whole)] ^= 1 << position % 8
        path.write_bytes(damaged)
        np.testing.assert_array_equal(cache.get(sha256("key"), "params", lambda: ARRAY), ARRAY)
    for cut in cuts:
        path.write_bytes(whole[: cut % len(whole)])
        np.testing.assert_array_equal(cache.get(sha256("key"), "params", lambda: ARRAY), ARRAY)
        assert len(path.read_bytes()) == len(whole)


def bits(folder):
    "All bits around the array: names, sizes, types, checksums; and some inside it."
    size = len(stored(FeatureCache(folder)).read_bytes())
    return [
        8 * byte + bit
        for byte in [*range(170), *range(170, size, 997), *range(size - 80, size)]
        for bit in range(8)
    ]


@pytest.mark.slow
def test_every_turned_bit_is_noticed_or_harmless(tmp_path):
    check_damage(FeatureCache, tmp_path, bits(tmp_path), [])


@given(st.lists(st.integers(0, 10**6), max_size=5))
def test_every_cut_is_noticed(tmp_path_factory, cuts):
    check_damage(FeatureCache, tmp_path_factory.mktemp("cache"), [], cuts)


class TrustsNumpy(FeatureCache):
    "NumPy stops reading where the array ends by its own header, before the checksum is compared."

    def get(self, key, params, compute):
        try:
            with np.load(self.path(key, params)) as file:
                return file["array"]
        except Exception:
            return super().get(key, params, compute)


class TrustsLength(FeatureCache):
    "Raw bytes: no checksum at all."

    def get(self, key, params, compute):
        if not self.path(key, params).exists():
            return super().get(key, params, compute)
        return np.frombuffer(
            self.path(key, params).read_bytes()[-22 - 55 - ARRAY.nbytes : -22 - 55], ARRAY.dtype
        ).reshape(ARRAY.shape)


@pytest.mark.parametrize("wrong", [TrustsNumpy, TrustsLength])
def test_the_check_notices_trusting_caches(tmp_path, wrong):
    with pytest.raises(AssertionError):
        check_damage(wrong, tmp_path, bits(tmp_path), [])


def check_keys(make_cache, folder):
    "Content and parameters both count; neither file names nor order do."
    cache = make_cache(folder)
    for content, params in (("a", "1"), ("b", "1"), ("a", "2"), ("a", "1")):
        expected = np.array([ord(content), int(params)])
        np.testing.assert_array_equal(
            cache.get(sha256(content), params, lambda: expected), expected
        )


class ForgetsParameters(FeatureCache):
    def get(self, key, params, compute):
        return super().get(key, "", compute)


class ForgetsContent(FeatureCache):
    def get(self, key, params, compute):
        return super().get(sha256(""), params, compute)


def test_keys(tmp_path):
    check_keys(FeatureCache, tmp_path)


@pytest.mark.parametrize("wrong", [ForgetsParameters, ForgetsContent])
def test_the_check_notices_forgotten_keys(tmp_path, wrong):
    with pytest.raises(AssertionError):
        check_keys(wrong, tmp_path)


def write_for_ever(folder):
    cache, array = FeatureCache(folder), np.arange(2_000_000, dtype=np.float32)
    for number in range(10_000):
        cache.get(sha256(str(number)), "params", lambda: array + number)


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05])
def test_a_killed_writer_leaves_nothing_that_is_believed(tmp_path, delay):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=write_for_ever, args=[tmp_path / "cache"], daemon=True)
    process.start()
    while not list((tmp_path / "cache").rglob("*.tmp")) and process.is_alive():
        time.sleep(0.001)  # until it is in the middle of a file
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for path in (tmp_path / "cache").rglob("*.npz"):  # whatever has its final name is whole
        with zipfile.ZipFile(path) as file:
            assert file.testzip() is None
    cache, array = FeatureCache(tmp_path / "cache"), np.arange(2_000_000, dtype=np.float32)
    for number in range(len(list((tmp_path / "cache").rglob("*.npz"))) + 1):
        assert (
            cache.get(sha256(str(number)), "params", lambda: array + number) == array + number
        ).all()


def fill(arguments):
    folder, order = arguments
    cache = FeatureCache(folder)
    return [
        int(cache.get(sha256(str(number)), "params", lambda: np.full(5_000, number)).sum())
        for number in order
    ]


def test_several_processes_fill_one_cache(tmp_path):
    orders = [np.random.default_rng(seed).permutation(60).tolist() for seed in range(4)]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        for order, sums in zip(
            orders, pool.map(fill, [(tmp_path / "cache", order) for order in orders])
        ):
            assert sums == [5_000 * number for number in order]
    assert len(list((tmp_path / "cache").rglob("*"))) == len(
        list((tmp_path / "cache").rglob("*.npz"))
    ) + len([p for p in (tmp_path / "cache").rglob("*") if p.is_dir()])


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    cache = FeatureCache(tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match="SPEECHIMG_CACHE") as told:
        for _ in range(3):
            np.testing.assert_array_equal(cache.get(sha256(""), "params", lambda: ARRAY), ARRAY)
    assert len(told) == 1
    with pytest.raises(TypeError):
        FeatureCache(tmp_path / "cache").get(sha256(""), "params", lambda: np.array([None]))
    assert not list(tmp_path.rglob("*.npz"))


def test_a_cached_corpus_loads_quickly(tmp_path):
    cache, keys = FeatureCache(tmp_path), [sha256(str(number)) for number in range(1_000)]
    for key in keys:
        cache.get(key, "params", lambda: np.zeros((20, 96), np.float16))
    spent = []
    for _ in range(3):  # what disturbs the machine makes it longer
        start = time.process_time()
        for key in keys:
            cache.get(key, "params", None)
        spent.append(time.process_time() - start)
    assert min(spent) < 1.1  # 13,000 clips in less than 15 seconds


# Batches and masks


def check_collate(make, features):
    "Every pair keeps its own frames, its own picture and its own length."
    rows = [3, 17, 4, 11]
    batch = make(features, rows)
    assert (
        batch.speech.dtype == batch.image.dtype == torch.float32
        and batch.speech_lengths.dtype == batch.ids.dtype == torch.int64
    )
    assert batch.speech.shape == (4, features.lengths[rows].max(), 2) and batch.image.shape == (
        4,
        3,
        24,
        24,
    )
    for place, row in enumerate(rows):
        n = features.lengths[row]
        assert (
            batch.speech_lengths[place] == n
            and batch.ids[place] == features.ids[row]
            and batch.uttids[place] == features.uttids[row]
        )
        np.testing.assert_array_equal(
            batch.speech[place, :n], features.speech[row].astype(np.float32)
        )
        assert (batch.speech[place, n:] == 0).all()
        np.testing.assert_array_equal(
            batch.image[place], features.image[features.image_of[row]].astype(np.float32) / 255
        )


def test_collate(features):
    check_collate(collate, features)
    floats = Simple(
        speech=features.speech,
        image=[image.astype(np.float16) for image in features.image],
        image_of=features.image_of,
        ids=features.ids,
        uttids=features.uttids,
    )
    assert collate(floats, [0]).image.max() > 1  # only bytes are pixels


def swapped(features, rows):
    batch = collate(features, rows)
    batch.image = batch.image.flip(0)
    return batch


def own_row_pictures(features, rows):
    batch = collate(features, rows)
    batch.image = (
        torch.from_numpy(
            np.stack([features.image[row % len(features.image)] for row in rows])
        ).float()
        / 255
    )
    return batch


def repeated_padding(features, rows):
    batch = collate(features, rows)
    for one, n in zip(batch.speech, batch.speech_lengths):
        one[n:] = one[n - 1]
    return batch


def one_length(features, rows):
    batch = collate(features, rows)
    batch.speech_lengths = torch.full_like(batch.speech_lengths, batch.speech.shape[1])
    return batch


@pytest.mark.parametrize("wrong", [swapped, own_row_pictures, repeated_padding, one_length])
def test_the_check_notices_wrong_collation(features, wrong):
    with pytest.raises(AssertionError):
        check_collate(wrong, features)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 12))
def test_masks(lengths, T):
    assert speech_mask(torch.tensor(lengths), T).tolist() == [
        [t < n for t in range(T)] for n in lengths
    ]


def test_a_batch_moves(features):
    batch = collate(features, [0, 1]).to("cpu")
    assert isinstance(batch, Batch) and batch.uttids == features.uttids[:2]
    assert all(
        value.device.type == "meta"
        for value in vars(batch.to("meta")).values()
        if torch.is_tensor(value)
    )


# Epochs


@st.composite
def corpora(draw):
    "ids, groups and lengths: 1 to 40 images with 0 to 6 captions, some of them siblings."
    images = draw(
        st.lists(st.tuples(st.integers(0, 6), st.integers(-1, 4)), min_size=1, max_size=40)
    )
    captions = [
        (image, group) for image, (count, group) in enumerate(images) for _ in range(count)
    ] or [(0, -1)]
    captions = draw(st.permutations(captions))
    lengths = draw(st.lists(st.integers(1, 60), min_size=len(captions), max_size=len(captions)))
    return Simple(
        ids=torch.tensor([image for image, _ in captions]),
        groups=torch.tensor([group for _, group in captions]),
        lengths=np.array(lengths),
    )


OPTIONS = st.fixed_dictionaries(
    {
        "captions_per_image": st.integers(0, 3),
        "siblings": st.sampled_from([0.0, 0.3, 0.5, 1.0]),
        "bucket": st.booleans(),
        "drop_last": st.booleans(),
    }
)


def check_epoch(make, corpus, batch_size, options):
    "What an epoch promises."
    n, ids = len(corpus.ids), corpus.ids.tolist()
    limit = options["captions_per_image"] or n
    possible = (
        sum(min(limit, ids.count(image)) for image in set(ids)) >= batch_size
    )  # can one batch be filled at all?
    try:
        batches = make(corpus, batch_size, generator(5), **options)
    except data.InputError:
        assert options["drop_last"] and not possible
        return
    assert batches == make(corpus, batch_size, generator(5), **options)
    used = [row for batch in batches for row in batch]
    assert len(used) == len(set(used)) and all(
        isinstance(row, int) and 0 <= row < n for row in used
    )
    for batch in batches:
        assert 0 < len(batch) <= batch_size
        assert all(
            [ids[row] for row in batch].count(image) <= limit
            for image in {ids[row] for row in batch}
        )
    if options["drop_last"]:
        assert possible and batches and all(len(batch) == batch_size for batch in batches)
    else:
        assert sorted(used) == list(range(n))


@given(corpora(), st.integers(1, 12), OPTIONS)
def test_epochs_keep_their_promises(corpus, batch_size, options):
    check_epoch(epoch_batches, corpus, batch_size, options)


def slices(
    features, batch_size, generator, captions_per_image=1, siblings=0.0, bucket=True, drop_last=True
):
    "Shuffle and cut, as everybody does: captions of one image meet."
    order = torch.randperm(len(features.ids), generator=generator).tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batch for batch in batches if len(batch) == batch_size or not drop_last]


def by_global_state(features, batch_size, generator, **options):
    return epoch_batches(
        features, batch_size, torch.Generator().manual_seed(np.random.randint(10**6)), **options
    )


def with_replacement(features, batch_size, generator, **options):
    batches = epoch_batches(features, batch_size, generator, **options)
    return batches + batches[:1]


def always_partial(features, batch_size, generator, **options):
    return epoch_batches(features, batch_size, generator, **options | {"drop_last": False})


@pytest.mark.parametrize("wrong", [slices, by_global_state, with_replacement, always_partial])
def test_the_check_notices_wrong_epochs(wrong):
    rng = np.random.default_rng(0)
    corpus = Simple(
        ids=torch.arange(50) // 5, groups=torch.full((50,), -1), lengths=rng.integers(1, 60, 50)
    )
    with pytest.raises(AssertionError):
        check_epoch(
            wrong,
            corpus,
            8,
            {"captions_per_image": 1, "siblings": 0.0, "bucket": True, "drop_last": True},
        )


def many(n=13_000, seed=0):
    """Two captions an image, 60 % of the images in groups of four siblings, lengths alike within a
    group.
    """
    rng = np.random.default_rng(seed)
    image = np.arange(n) // 2
    lengths = (rng.gamma(9, 3, n)[image // 4] * rng.uniform(0.9, 1.1, n)).astype(int) + 5
    return Simple(
        ids=torch.tensor(image),
        groups=torch.tensor(np.where(image < 0.3 * n, image // 4, -1)),
        lengths=lengths,
    )


def kin(corpus, batch):
    "Share of a batch that meets a sibling."
    ids, groups = corpus.ids[batch], corpus.groups[batch]
    return (
        ((groups[:, None] == groups) & (groups >= 0) & (ids[:, None] != ids))
        .any(1)
        .float()
        .mean()
        .item()
    )


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_siblings_get_their_share_of_every_batch(share):
    corpus = many()
    shares = [
        kin(corpus, batch) for batch in epoch_batches(corpus, 64, generator(), siblings=share)
    ]
    assert (
        len(shares) == 203
        and share - 0.1 < min(shares)
        and np.quantile(shares, 0.95) < share + 0.2
        and share - 0.02 < np.mean(shares) < share + 0.06
    )  # some meet by chance
    assert (
        np.mean(
            [kin(corpus, batch) for batch in epoch_batches(corpus, 64, generator(), bucket=False)]
        )
        < 0.1
    )


def test_siblings_are_as_many_as_there_are():
    corpus = many()
    assert (
        np.mean(
            [kin(corpus, batch) for batch in epoch_batches(corpus, 64, generator(), siblings=1.0)]
        )
        > 0.57
    )
    everybody = Simple(
        ids=torch.arange(90), groups=torch.arange(90) // 3, lengths=np.full(90, 7)
    )  # triples do not fill 16 places
    batches = epoch_batches(everybody, 16, generator(), siblings=1.0)
    assert len(batches) == 5 and all(kin(everybody, batch) > 0.8 for batch in batches)


def test_buckets_save_padding_and_still_vary():
    corpus = many()

    def padding(batches):
        return 1 - sum(corpus.lengths[batch].sum() for batch in batches) / sum(
            corpus.lengths[batch].max() * len(batch) for batch in batches
        )

    first, second, *others = (
        epoch_batches(corpus, 64, generator(seed), siblings=0.5) for seed in range(5)
    )
    assert (
        padding(first)
        < 0.15
        < 0.3
        < padding(epoch_batches(corpus, 64, generator(), siblings=0.5, bucket=False))
    )
    batch_of = {row: number for number, batch in enumerate(second) for row in batch}
    same = [
        batch_of.get(a) == batch_of.get(b)
        for batch in first[:20]
        for a in batch
        for b in batch
        if corpus.groups[a] < 0 and a < b
    ]
    assert np.mean(same) < 0.2
    assert (
        len({row for batches in (first, second, *others) for batch in batches for row in batch})
        == 13_000
    )  # nobody is always left out
    order = [corpus.lengths[batch].mean() for batch in first]
    assert (
        abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.3
    )  # short and long batches take turns


def test_an_epoch_is_planned_quickly():
    corpus, spent = many(), []
    for _ in range(3):
        start = time.process_time()
        epoch_batches(corpus, 64, generator(), siblings=0.5)
        spent.append(time.process_time() - start)
    assert min(spent) < 0.3


# Augmentation


def a_batch(seed=0, pixels=False, B=5, T=40):
    g = generator(seed)
    image = torch.rand(B, 3, 50, 50, generator=g) if pixels else torch.randn(B, 9, 4, generator=g)
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    speech = torch.randn(B, T, 6, generator=g) * speech_mask(lengths, T)[..., None]
    return Batch(speech, lengths, image, torch.arange(B), [str(b) for b in range(B)])


def check_augment(make, seed=0, pixels=False):
    """Lengths within a tenth, padding without influence and zero, values within what was there,
    repeatable, and different.
    """
    batch = a_batch(seed, pixels)
    changed = make(batch, generator(seed))
    again = make(batch, generator(seed))
    assert torch.equal(changed.speech, again.speech) and torch.equal(changed.image, again.image)
    ratio = changed.speech_lengths / batch.speech_lengths
    slack = 0.5 / batch.speech_lengths
    assert ((0.9 - slack <= ratio) & (ratio <= 1.1 + slack)).all() and (
        changed.speech_lengths >= 1
    ).all()
    assert changed.speech.shape[1] == changed.speech_lengths.max()
    mask = speech_mask(changed.speech_lengths, changed.speech.shape[1])
    assert (
        (changed.speech[~mask] == 0).all()
        and changed.speech.isfinite().all()
        and changed.image.isfinite().all()
    )
    rubbish = make(
        Batch(
            batch.speech.masked_fill(
                ~speech_mask(batch.speech_lengths, 40)[..., None], float("nan")
            ),
            batch.speech_lengths,
            batch.image,
            batch.ids,
            batch.uttids,
        ),
        generator(seed),
    )
    assert torch.equal(rubbish.speech, changed.speech)
    for one, n, old, m in zip(
        changed.speech, changed.speech_lengths, batch.speech, batch.speech_lengths
    ):
        near = 0.051 * old[:m].std(0, correction=0) + 1e-4
        assert (one[:n] <= old[:m].amax(0) + near).all() and (
            one[:n] >= old[:m].amin(0) - near
        ).all()
    assert (
        changed.image.shape == batch.image.shape
        and torch.equal(changed.ids, batch.ids)
        and changed.uttids == batch.uttids
    )
    assert not torch.equal(changed.image, batch.image) and not torch.equal(
        make(batch, generator(seed + 1)).image, changed.image
    )


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_augment(seed, pixels):
    check_augment(augment, seed, pixels)


def stretches_padding(batch, generator):
    "Interpolates over the whole tensor, padding included."
    changed = augment(batch, generator)
    speech = torch.nn.functional.interpolate(
        batch.speech.mT, size=changed.speech.shape[1], mode="linear"
    ).mT
    changed.speech = speech * speech_mask(changed.speech_lengths, speech.shape[1])[..., None]
    return changed


def noise_in_padding(batch, generator):
    changed = augment(batch, generator)
    changed.speech = changed.speech + 0.01
    return changed


def old_lengths(batch, generator):
    changed = augment(batch, generator)
    changed.speech_lengths = batch.speech_lengths
    return changed


def global_noise(batch, generator):
    changed = augment(batch, generator)
    changed.image = changed.image + 0.01 * torch.randn(changed.image.shape)
    return changed


@pytest.mark.parametrize("wrong", [stretches_padding, noise_in_padding, old_lengths, global_noise])
def test_the_check_notices_wrong_augmentation(wrong):
    with pytest.raises(AssertionError):
        check_augment(wrong)


def check_sides(make):
    "What was on the left stays on the left, what came first stays first."
    image = torch.zeros(6, 3, 50, 50)
    image[..., :25] = 1
    speech = torch.arange(30.0)[None, :, None].repeat(6, 1, 1)
    for seed in range(5):
        changed = make(
            Batch(speech, torch.full((6,), 30), image, torch.arange(6), [""] * 6), generator(seed)
        )
        assert (
            changed.image[..., :20].mean((1, 2, 3)) > changed.image[..., 30:].mean((1, 2, 3)) + 0.5
        ).all()
        for one, n in zip(changed.speech, changed.speech_lengths):
            assert (
                one[: n // 3].mean() < one[n // 3 : 2 * n // 3].mean() < one[2 * n // 3 : n].mean()
            )


def mirrored(batch, generator):
    changed = augment(batch, generator)
    changed.image = torch.where(
        torch.rand(len(changed.image), 1, 1, 1, generator=generator) < 0.5,
        changed.image.flip(-1),
        changed.image,
    )
    return changed


def test_left_stays_left():
    check_sides(augment)
    with pytest.raises(AssertionError):
        check_sides(mirrored)


def test_patches_stay_in_place():
    "On a grid of features each patch is itself, or the picture's mean."
    image = (torch.arange(49.0)[None, :, None] * 10).repeat(2, 1, 3)
    batch = Batch(torch.randn(2, 5, 3), torch.tensor([5, 5]), image, torch.arange(2), ["", ""])
    changed = augment(batch, generator()).image
    blank = ((changed - 240).abs() < 8).all(-1) & ((image - 240).abs() > 8).all(-1)
    assert 0 < blank.float().mean() < 0.3
    assert ((changed - image).abs()[~blank] < 8).all()


def test_augmentation_is_quick():
    batch = Batch(
        torch.randn(64, 40, 96),
        torch.randint(1, 41, (64,)),
        torch.randn(64, 49, 320),
        torch.arange(64),
        [""] * 64,
    )
    spent = []
    for _ in range(5):
        start = time.process_time()
        augment(batch, generator())
        spent.append(time.process_time() - start)
    assert min(spent) < 0.06


def test_pictures_of_any_kind_have_one_kind():
    for mode in (
        "1",
        "L",
        "LA",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "CMYK",
        "YCbCr",
        "HSV",
        "I;16",
        "I",
        "F",
    ):
        image = Image.new(mode, (30, 20))
        form = "TIFF" if mode in ("CMYK", "YCbCr", "F", "I", "LA", "I;16") else "PNG"
        try:
            content = image_bytes(image, form)
        except OSError:
            continue  # a mode that no file holds
        found = decode_image(content, mode)
        assert found.mode == "RGB" and found.size == (30, 20)


def test_miniature_files_are_what_they_seem():
    from miniature import make_files

    files = make_files(12, 2)
    entries = json.loads(files["train.json"])["data"]
    assert len(entries) == 12 and all(len(entry["captions"]) == 2 for entry in entries)
    assert len({files[entry["image"]] for entry in entries}) == 12
    assert make_files(12, 2) == files and make_files(12, 2, seed=1) != files
    assert all(decode_image(files[entry["image"]], "").size == (96, 96) for entry in entries)


# One batch ahead


@given(st.lists(st.integers(), max_size=9), st.integers(0, 9))
def test_one_ahead_changes_nothing(items, broken):
    """The same items in the same order; what fetching one of them raises comes after those before
    it.
    """
    from speechimg.data import one_ahead

    def source():
        for place, item in enumerate(items):
            if place == broken:
                raise InputError(f"item {place}", "is broken", "mend it")
            yield item

    seen = []
    try:
        for item in one_ahead(source()):
            seen.append(item)
        assert broken >= len(items)
    except InputError as error:
        assert f"item {broken}" in str(error)
    assert seen == items[:broken]


def test_one_ahead_fetches_while_the_last_one_is_used():
    from speechimg.data import one_ahead

    fetched, began = [], threading.Event()

    def source():
        for number in range(3):
            fetched.append(number)
            if number:
                began.set()
            yield number

    for item in one_ahead(source()):
        if item == 0:
            assert began.wait(60)  # the next one is on its way, though this one is in use
    assert fetched == [0, 1, 2]


@pytest.mark.slow
def test_a_loop_that_is_left_early_ends():
    "An interrupted training must not hang at its end, waiting for a batch that nobody wants."
    code = (
        "from speechimg.data import one_ahead\n"
        "for item in one_ahead(iter(range(10**9))):\n"
        "    if item == 5: raise KeyboardInterrupt"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "KeyboardInterrupt" in done.stderr
