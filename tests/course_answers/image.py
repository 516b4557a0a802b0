"""Answers to an assignment: code that runs after the library's own functions and replaces some."""

RIGHT = {  # right, and written differently
    "pixel by pixel": """
def square(picture, size):
    picture = picture.convert("RGB")
    width, height = picture.size
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), (255, 255, 255))
    for x in range(width):
        for y in range(height):
            canvas.putpixel(
                (x + (side - width) // 2, y + (side - height) // 2), picture.getpixel((x, y))
            )
    return canvas if side == size else canvas.resize((size, size), Image.Resampling.BICUBIC)


def numbers(self, picture):
    small = square(picture, self.size)
    return np.stack([np.array(band) for band in small.split()])


Pixels.__call__ = numbers


def patches(maps):
    return torch.stack(
        [maps[:, :, y, x] for y in range(maps.shape[2]) for x in range(maps.shape[3])], dim=1
    )


def grid_codes(rows, columns):
    return torch.stack([row + column for row in rows for column in columns])
""",
    "shapes": """
def patches(maps):
    return maps.flatten(2).transpose(1, 2)


def grid_codes(rows, columns):
    return rows.repeat_interleave(len(columns), 0) + columns.repeat(len(rows), 1)


def numbers(self, picture):
    return np.asarray(square(picture, self.size)).transpose(2, 0, 1).copy()


Pixels.__call__ = numbers


def look(self, features, lengths=None):
    found = self.stem((features - 0.5) * 4)
    batch, width, high, wide = found.shape
    tokens = self.norm_tokens(found.permute(0, 2, 3, 1).reshape(batch, high * wide, width))
    return self.reader(tokens, (self.rows.unsqueeze(1) + self.columns.unsqueeze(0)).flatten(0, 1))


ImageTower.forward = look
""",
}

SQUARE = """
def square(picture, size):
    picture = picture.convert("RGB")
    side = max(picture.size)
    canvas = Image.new("RGB", (side, side){colour})
    canvas.paste({picture}, {place})
    return canvas if side == size else canvas.resize((size, size), Image.Resampling.BICUBIC)
"""
GOOD = {
    "colour": ', "white"',
    "picture": "picture",
    "place": "((side - picture.width) // 2, (side - picture.height) // 2)",
}
PIXELS = """
def numbers(self, picture):
    return {result}


Pixels.__call__ = numbers
"""
TOWER = """
def look(self, features, lengths=None):
    tokens = patches(self.stem({pixels}))
    codes = grid_codes(self.rows, self.columns)
    return self.reader({tokens}, {codes})


ImageTower.forward = look
"""
STEPS = {"pixels": "4 * features - 2", "tokens": "self.norm_tokens(tokens)", "codes": "codes"}

WRONG = {  # name: (code, numbers of the checks that it must fail, part of a message)
    "cropped": (
        """
def square(picture, size):
    picture, side = picture.convert("RGB"), min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    return picture if side == size else picture.resize((size, size))
""",
        [1, 2, 3, 4, 6],
        "was cropped",
    ),
    "stretched": (
        """
def square(picture, size):
    picture = picture.convert("RGB")
    return picture if picture.size == (size, size) else picture.resize((size, size))
""",
        [1, 2, 3, 4, 6],
        "was stretched",
    ),
    "mirrored": (
        SQUARE.format(**GOOD | {"picture": "picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)"}),
        [1, 2, 3, 4, 5, 6],
        "was mirrored",
    ),
    "black margin": (SQUARE.format(**GOOD | {"colour": ""}), [1, 2, 3, 4, 6], "margin is black"),
    "in the corner": (
        SQUARE.format(**GOOD | {"place": "(0, 0)"}),
        [1, 2, 3, 4, 6],
        "lies at the top",
    ),
    "mode as it was": (
        """
def square(picture, size):
    side = max(picture.size)
    canvas = Image.new(picture.mode, (side, side), "white")
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas if side == size else canvas.resize((size, size), Image.Resampling.BICUBIC)
""",
        [2, 4],
        "should come out in mode RGB",
    ),
    "colours last": (
        PIXELS.format(result="np.asarray(square(picture, self.size))"),
        [5, 6],
        "should be (3, 16, 16)",
    ),
    "columns before rows": (
        PIXELS.format(result='rearrange(np.asarray(square(picture, self.size)), "h w c -> c w h")'),
        [5, 6],
        "Rows and columns are exchanged",
    ),
    "reshaped numbers": (
        PIXELS.format(
            result="np.asarray(square(picture, self.size)).reshape(3, self.size, self.size)"
        ),
        [5, 6],
        "only counted differently",
    ),
    "between 0 and 1": (
        PIXELS.format(
            result='rearrange(np.asarray(square(picture, self.size)), "h w c -> c h w") / 255'
        ),
        [5, 6],
        "keep whole numbers",
    ),
    "patches by column": (
        """
def patches(maps):
    return rearrange(maps, "b w y x -> b (x y) w")
""",
        [7, 8, 12, 13],
        "column by column",
    ),
    "patches reshaped": (
        """
def patches(maps):
    return maps.reshape(maps.shape[0], -1, maps.shape[1])
""",
        [7, 8, 12, 13],
        "exchange the axes",
    ),
    "codes by column": (
        """
def grid_codes(rows, columns):
    return rearrange(rows + columns[:, None], "x y w -> (x y) w")
""",
        [9, 10, 13],
        "patches go row by row",
    ),
    "rows alone": (
        """
def grid_codes(rows, columns):
    return rows.repeat_interleave(len(columns), 0)
""",
        [9, 10, 11, 13],
        "column codes are missing",
    ),
    "codes multiplied": (
        """
def grid_codes(rows, columns):
    return (rows[:, None] * columns).flatten(0, 1)
""",
        [9, 10, 13],
        "take their sum",
    ),
    "pixels as they are": (
        TOWER.format(**STEPS | {"pixels": "features"}),
        [13],
        "still between 0 and 1",
    ),
    "pixels from -1 to 1": (
        TOWER.format(**STEPS | {"pixels": "2 * features - 1"}),
        [13],
        "between -1 and 1",
    ),
    "norm forgotten": (
        TOWER.format(**STEPS | {"tokens": "tokens"}),
        [13],
        "norm of the tokens is missing",
    ),
    "codes in the norm": (
        TOWER.format(
            **STEPS | {"tokens": "self.norm_tokens(tokens + codes)", "codes": "0 * codes"}
        ),
        [13],
        "normalised with the tokens",
    ),
    "codes twice": (
        TOWER.format(**STEPS | {"tokens": "self.norm_tokens(tokens) + codes"}),
        [13],
        "added twice",
    ),
    "no codes": (TOWER.format(**STEPS | {"codes": "0 * codes"}), [11, 13], "The codes are missing"),
    "tokens alone": (
        """
def look(self, features, lengths=None):
    tokens = self.norm_tokens(patches(self.stem(4 * features - 2)))
    return self.reader(tokens, grid_codes(self.rows, self.columns)).tokens


ImageTower.forward = look
""",
        [11, 12, 13, 14],
        "tokens",
    ),
}
