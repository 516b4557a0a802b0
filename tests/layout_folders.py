"""Miniature folders in the real layouts of Flickr8k Audio, SpokenCOCO, Places Audio and SPEECH-
COCO, defects included.

Each function writes a folder and returns it; `files_of_...` gives the same as {name: bytes}, to be
changed before it is written. The sounds and pictures are those of miniature.py, so that a tiny
model can be trained on them.
"""

import json

from miniature import COLOURS, SHAPES, draw, image_bytes, speak, wav_bytes, write_files

NOUNS = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]


def nouns_of(number):
    "What the picture of this number shows: one noun, or two after all single ones are used up."
    first, second = NOUNS[number % len(NOUNS)], NOUNS[(number // len(NOUNS) + number) % len(NOUNS)]
    return (first,) if number < len(NOUNS) or first == second else (first, second)


def picture(number):
    return image_bytes(draw(nouns_of(number), seed=number), "JPEG", quality=90)


def sound(number, voice):
    return wav_bytes(speak(nouns_of(number), voice, (number, voice)))


def text(number):
    return "a " + " left of a ".join(nouns_of(number))


def header_claims(wav, extra):
    """The bytes of a wav whose header claims `extra` bytes more than there are (or fewer), as one
    file of Flickr8k Audio does.
    """
    at = wav.index(b"data") + 4
    size = int.from_bytes(wav[at : at + 4], "little") + extra
    return wav[:at] + size.to_bytes(4, "little") + wav[at + 4 :]


def split_sizes(n_images):
    "n_images may be a number for all splits, or {split: number}."
    return (
        n_images
        if isinstance(n_images, dict)
        else dict.fromkeys(("train", "val", "test"), n_images)
    )


# Flickr8k Audio


def files_of_flickr(n_images=4, captions=5, karpathy=False, images="Images"):
    """{name: bytes}: four text tables, or dataset_flickr8k.json; one key malformed, two pictures
    without a split, one wrong header.
    """
    files, number, tokens, capt, spk, described = {}, 0, [], [], [], []
    for split, size in split_sizes(n_images).items():
        listed = []
        for _ in range(size):
            name = f"{1000 + number}_{number:08x}.jpg"
            files[f"{images}/{name}"] = picture(number)
            for n in range(captions):
                wav = f"{name[:-4]}_{n}.wav"
                files[f"flickr_audio/wavs/{wav}"] = sound(number, n)
                capt.append(f"{wav} {name} #{n}")
                spk.append(f"{wav} {n + 1}")
                tokens.append(f"{name}#{n}\t{text(number)} , {n} .")
            described.append(
                {
                    "filename": name,
                    "imgid": number,
                    "split": split,
                    "sentids": [],
                    "sentences": [
                        {"raw": f"{text(number)} , {n} .", "tokens": [], "sentid": n}
                        for n in range(captions)
                    ],
                }
            )
            listed.append(name)
            number += 1
        if not karpathy:
            files[f"Flickr_8k.{'dev' if split == 'val' else split}Images.txt"] = "".join(
                f"{name}\n" for name in listed
            ).encode()
    files[f"{images}/9999_unsplit.jpg"] = picture(0)
    tokens += [f"9999_unsplit.jpg#{n}\tnobody says this" for n in range(5)] + [
        f"2258277193_586949ec62.jpg.1#{n}\ta malformed key" for n in range(5)
    ]
    wrong = capt[0].split()[0]
    files[f"flickr_audio/wavs/{wrong}"] = header_claims(files[f"flickr_audio/wavs/{wrong}"], 10_000)
    files["flickr_audio/wav2capt.txt"] = "".join(
        f"{line}\n" for line in reversed(capt)
    ).encode()  # in no helpful order
    files["flickr_audio/wav2spk.txt"] = "".join(f"{line}\n" for line in spk).encode()
    if karpathy:
        files["dataset_flickr8k.json"] = json.dumps(
            {"dataset": "flickr8k", "images": described}
        ).encode()
    else:
        files["Flickr8k.token.txt"] = "".join(f"{line}\n" for line in tokens).encode()
    return files


def flickr(folder, n_images=4, captions=5, karpathy=False, images="Images", zip=False):
    "A miniature of Flickr8k Audio; n_images per split, or {split: number}."
    return write_files(folder, files_of_flickr(n_images, captions, karpathy, images), zip)


# SpokenCOCO


def coco_name(part, number):
    return f"{part}2014/COCO_{part}2014_{number:012d}.jpg"


def files_of_spokencoco(n_images=4, captions=(5, 6), karpathy=True, images=""):
    """{name: bytes}: pictures have 5 or 6 captions in turn; Karpathy's train holds one picture of
    the other part, his `restval`.
    """
    files, parts, described, number = {}, {"train": [], "val": []}, [], 0
    for split, size in split_sizes(n_images).items():
        for place in range(size):
            part = "train" if split == "train" and place < max(1, size - 1) else "val"
            name, spoken = coco_name(part, 391_000 + number), []
            files[f"{images}{name}"] = picture(number)
            for n in range(captions[number % len(captions)]):
                uttid = f"m07-{'ABCDEF'[n]}3NL_{391_000 + number}_{10 * number + n}"
                files[f"SpokenCOCO/wavs/{part}/{n}/{uttid}.wav"] = sound(number, n)
                spoken.append(
                    {
                        "text": f"{text(number)} {n}",
                        "speaker": f"m07-{n}",
                        "uttid": uttid,
                        "wav": f"wavs/{part}/{n}/{uttid}.wav",
                    }
                )
            parts[part].append({"image": name, "captions": spoken})
            described.append(
                {
                    "filename": name.split("/")[1],
                    "filepath": f"{part}2014",
                    "cocoid": 391_000 + number,
                    "imgid": number,
                    "split": "restval" if split == "train" and part == "val" else split,
                    "sentences": [],
                }
            )
            number += 1
    for part, data in parts.items():
        files[f"SpokenCOCO/SpokenCOCO_{part}.json"] = json.dumps({"data": data[::-1]}).encode()
    if karpathy:
        files["dataset_coco.json"] = json.dumps({"dataset": "coco", "images": described}).encode()
    return files


def spokencoco(folder, n_images=4, captions=(5, 6), karpathy=True, images="", zip=False):
    """A miniature of SpokenCOCO; images says where train2014/ and val2014/ lie, for example
    'mscoco_img/'.
    """
    return write_files(folder, files_of_spokencoco(n_images, captions, karpathy, images), zip)


# Places Audio

YEAR_2020 = ("train_2020", "dev_seen_2020", "dev_unseen_2020", "test_seen_2020", "test_unseen_2020")


def files_of_places(n_images=4, lists=("train", "val"), images="Places205/", tables=False):
    """{name: bytes}: one caption per picture. lists are the JSON files in metadata/; with tables,
    text and speaker stand there instead.
    """
    files, number, top = {}, 0, "PlacesAudio_400k_distro/"
    rows_of = {}
    for name in lists:
        for _ in range(n_images):
            uttid = f"A{number:03d}-GSUN_{number:08X}"
            image, wav = (
                f"{'abcd'[number % 4]}/place{number % 3}/gsun_{number:08x}.jpg",
                f"wavs/{number % 5}/utterance_{number}.wav",
            )
            files[images + image], files[top + wav] = picture(number), sound(number, number % 4)
            row = {
                "uttid": uttid,
                "speaker": f"A{number:03d}",
                "asr_text": text(number),
                "wav": wav,
                "image": image,
            }
            rows_of.setdefault(name, []).append(row)
            number += 1
    for name, rows in rows_of.items():
        kept = [
            {key: row[key] for key in (("uttid", "wav", "image") if tables else row)}
            for row in rows
        ]
        content = {
            "image_base_path": "/authors/images256/",
            "audio_base_path": "/authors/PlacesAudio_400k_distro/",
            "data": kept,
        }
        files[f"{top}metadata/{name}.json"] = json.dumps(content).encode()
    for table, key in (
        ("utt2ASR", "asr_text"),
        ("utt2spk", "speaker"),
        ("utt2wav", "wav"),
        ("utt2image", "image"),
    ):
        files[f"{top}metadata/{table}"] = "".join(
            f"{row['uttid']} {row[key]}\n" for rows in rows_of.values() for row in rows
        ).encode()
    return files


def places(
    folder, n_images=4, lists=("train", "val"), images="Places205/", tables=False, zip=False
):
    """A miniature of Places Audio: lists=('train', 'val') for the 400k release, YEAR_2020 for the
    splits of 2020.
    """
    return write_files(folder, files_of_places(n_images, lists, images, tables), zip)


# SPEECH-COCO


def files_of_speech_coco(n_images=4, captions=5, images="", top=""):
    "{name: bytes}: a JSON file beside each recording; two parts, train2014 and val2014."
    files, number, sizes = {}, 0, split_sizes(n_images)
    for part in ("train", "val"):
        for _ in range(sizes[part]):
            files[images + coco_name(part, 500 + number)] = picture(number)
            for n in range(captions):
                voice = ("Paul", "Elizabeth", "Judith", "Bronwen", "Phil", "Bruce")[n]
                name = f"{500 + number}_{100 * number + n}_{voice}_None_1-0"
                files[f"{top}{part}2014/wav/{name}.wav"] = sound(number, n)
                content = {
                    "duration": 0.5,
                    "speaker": voice,
                    "synthesisedCaption": f"{text(number)} {n}",
                    "timecode": [[0, "WORD", "a"]],
                    "speed": 1.0,
                    "wavFilename": f"{name}.wav",
                    "captionID": 100 * number + n,
                    "imgID": 500 + number,
                    "disfluency": ["", "None"],
                }
                files[f"{top}{part}2014/json/{name}.json"] = json.dumps(content).encode()
            number += 1
    return files


def speech_coco(folder, n_images=4, captions=5, images="", top="", zip=False):
    "A miniature of SPEECH-COCO."
    return write_files(folder, files_of_speech_coco(n_images, captions, images, top), zip)
