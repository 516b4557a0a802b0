"""Answers to an assignment: code that runs after the library's own functions and replaces some."""

JUDGE = """
def judge(self, heard, speech_mask, seen, pairs=None):
    if pairs is not None:
        heard, speech_mask = heard[pairs[0]], speech_mask[pairs[0]]
        seen = [[one[pairs[1]] for one in answers] for answers in seen]
    x = heard
    for place in range(len(self.blocks)):
        if place > 0:
            x = self.blocks[place].listen(x, speech_mask)
        x = self.blocks[place].think(x, answers=seen[place])
    return self.verdict(self.norm(x[:, 0])).float()


def hear(self, speech_tokens, speech_mask):
    return self.blocks[0].listen(speech_tokens.to(self.norm.weight.dtype), speech_mask)


MultimodalEncoder.judge, MultimodalEncoder.hear = judge, hear
"""

MAPS = """
@torch.no_grad()
def attention_maps(self, speech_tokens, speech_mask, image_tokens):
    x, maps = speech_tokens, []
    for block in self.blocks:
        x = block.listen(x, speech_mask)
        maps.append(block.attend_cross.weights(block.norm_cross(x), image_tokens))
        x = block.think(x, image_tokens)
    return torch.stack(maps, 1)


MultimodalEncoder.attention_maps = attention_maps
"""

LOSS = """
def sim_loss(positive, negative_image, negative_speech):
    logits = torch.cat([positive, negative_image, negative_speech]).float()
    labels = torch.tensor(
        [1] * len(positive) + [0] * (len(negative_image) + len(negative_speech)), dtype=torch.long
    )
    return F.cross_entropy(logits, labels) if len(logits) else logits.sum()
"""


def changed(code: str, *changes: tuple[str, str]) -> str:
    "An answer with a mistake put into it."
    for old, new in changes:
        assert old in code, old
        code = code.replace(old, new)
    return code


RIGHT = {  # right, and written differently
    "all tokens": JUDGE + MAPS + LOSS,
    "pair by pair": """
def hear(self, speech_tokens, speech_mask):
    "Recording by recording, without its padding, which comes back as zeros."
    out = torch.zeros(speech_tokens.shape, dtype=self.norm.weight.dtype)
    rows = []
    for one, valid in zip(speech_tokens.to(out.dtype), speech_mask):
        n = int(valid.sum())
        rows.append(torch.cat([self.blocks[0].listen(one[None, :n])[0], out[0, n:]]))
    return torch.stack(rows) if rows else out


def one_pair(self, x, mask, seen):
    n = int(mask.sum())
    x = x[None, :n]
    for place, (block, (key, value)) in enumerate(zip(self.blocks, seen)):
        x = block.think(block.listen(x) if place else x, answers=(key[None], value[None]))
    return self.verdict(self.norm(x))[:, 0]


def judge(self, heard, speech_mask, seen, pairs=None):
    rows, columns = pairs if pairs else (torch.arange(len(heard)),) * 2
    out = [torch.zeros(0, 2)]
    for r, c in zip(rows.tolist(), columns.tolist()):
        out.append(
            one_pair(
                self, heard[r], speech_mask[r], [[one[c] for one in answers] for answers in seen]
            )
        )
    return torch.cat(out)


def attention_maps(self, speech_tokens, speech_mask, image_tokens):
    layers, x = [], speech_tokens
    for block in self.blocks:
        x = block.listen(x, speech_mask)
        look, heads = block.attend_cross, block.attend_cross.heads
        q, k = look.query(block.norm_cross(x)), look.key(image_tokens)
        q, k = q.reshape(*q.shape[:2], heads, -1), k.reshape(*k.shape[:2], heads, -1)
        layers.append(
            torch.softmax(torch.einsum("nthd,nphd->nhtp", q, k) / q.shape[-1] ** 0.5, -1).detach()
        )
        x = block.think(x, image_tokens)
    return torch.stack(layers, dim=1)


MultimodalEncoder.hear, MultimodalEncoder.judge, MultimodalEncoder.attention_maps = (
    hear,
    judge,
    attention_maps,
)
""",
    "softplus": """
def surprise(logits, sign):
    return F.softplus(sign * (logits[:, 0].float() - logits[:, 1].float())).sum()


def sim_loss(positive, negative_image, negative_speech):
    pairs = len(positive) + len(negative_image) + len(negative_speech)
    return (
        surprise(positive, 1) + surprise(negative_image, -1) + surprise(negative_speech, -1)
    ) / max(pairs, 1)
""",
}

WRONG = {  # name: (code, numbers of the checks that it must fail, part of a message)
    "mask forgotten": (
        changed(JUDGE, ("(x, speech_mask)", "(x)"), (", speech_mask)\n\n\nM", ")\n\n\nM")),
        [2, 5, 6, 8],
        "Padding has an influence on the verdict",
    ),
    "mask forgotten later": (
        changed(JUDGE, ("(x, speech_mask)", "(x)")),
        [2, 5, 6],
        "every block that listens needs the mask",
    ),
    "mask inverted": (
        changed(
            JUDGE,
            ("(x, speech_mask)", "(x, ~speech_mask)"),
            (", speech_mask)\n\n\nM", ", ~speech_mask)\n\n\nM"),
        ),
        [1, 2, 5, 6, 8],
        "the mask is upside down",
    ),
    "mean of the tokens": (
        changed(JUDGE, ("x[:, 0]", "x.mean(1)")),
        [1, 2, 5, 6],
        "Is it the mean over the tokens?",
    ),
    "mean of the valid tokens": (
        changed(
            JUDGE,
            ("x[:, 0]", "(x * speech_mask[..., None]).sum(1) / speech_mask.sum(1, keepdim=True)"),
        ),
        [1, 5],
        "mean over the valid tokens",
    ),
    "last token": (changed(JUDGE, ("x[:, 0]", "x[:, -1]")), [1, 2, 5, 6], "Is it the last token?"),
    "somebody else's mask": (
        changed(JUDGE, ("speech_mask[pairs[0]]", "speech_mask[pairs[1]]")),
        [3, 6],
        "they belong to the recordings",
    ),
    "masks stay behind": (
        changed(
            JUDGE,
            (
                "speech_mask[pairs[0]]",
                "speech_mask[torch.arange(len(pairs[0])) % len(speech_mask)]",
            ),
        ),
        [3, 6],
        "The masks stayed behind",
    ),
    "pictures stay behind": (
        changed(JUDGE, ("one[pairs[1]]", "one[torch.arange(len(pairs[1])) % len(one)]")),
        [3, 6],
        "The pictures stayed behind",
    ),
    "pairs turned round": (
        changed(JUDGE, ("pairs is not None:", "pairs is not None:\n        pairs = pairs[::-1]")),
        [3, 6],
        "the wrong way round",
    ),
    "answers of block 0": (changed(JUDGE, ("seen[place]", "seen[0]")), [5], "each has its own"),
    "listened twice": (changed(JUDGE, ("if place > 0", "if True")), [5], "hear has done that"),
    "norm forgotten": (
        changed(JUDGE, ("self.norm(x[:, 0])", "x[:, 0]")),
        [5],
        "The last norm was forgotten",
    ),
    "float16 refused": (
        changed(JUDGE, (".to(self.norm.weight.dtype)", "")),
        [7],
        "convert them to the type of the weights",
    ),
    "picture cut off": (
        changed(
            JUDGE,
            (
                "x = heard\n",
                "x, seen = heard, [[one.detach() for one in answers] for answers in seen]\n",
            ),
        ),
        [8],
        "A patch gets no gradient",
    ),
    "maps over the words": (
        changed(
            MAPS,
            (
                "return torch.stack(maps, 1)",
                "maps = torch.stack(maps, 1).log()\n    return maps.softmax(-2)",
            ),
        ),
        [4, 9],
        "shared among the words",
    ),
    "maps before listening": (
        changed(
            MAPS,
            ("        x = block.listen(x, speech_mask)\n", ""),
            ("block.think(x,", "block.think(block.listen(x, speech_mask),"),
        ),
        [9],
        "after it has listened",
    ),
    "maps with a gradient": (changed(MAPS, ("@torch.no_grad()\n", "")), [4], "for looking at"),
    "class 0 is a match": (
        changed(LOSS, ("[1]", "[2]"), ("[0]", "[1]"), ("[2]", "[0]")),
        [10, 11, 12, 13],
        "Here class 0 means match",
    ),
    "mean of the parts": (
        """
def sim_loss(positive, negative_image, negative_speech):
    parts = [
        F.cross_entropy(part.float(), torch.full((len(part),), label))
        for part, label in ((positive, 1), (negative_image, 0), (negative_speech, 0))
        if len(part)
    ]
    return sum(parts) / len(parts) if parts else positive.sum()
""",
        [10, 12, 13],
        "This is the mean of three means",
    ),
    "softmax over the pairs": (
        changed(
            LOSS, ("F.cross_entropy(logits, labels)", "F.nll_loss(logits.log_softmax(0), labels)")
        ),
        [10, 11, 12, 13],
        "softmax over the pairs",
    ),
    "sigmoid of class 1": (
        changed(
            LOSS,
            (
                "F.cross_entropy(logits, labels)",
                "F.binary_cross_entropy_with_logits(logits[:, 1], labels.float())",
            ),
        ),
        [10, 12, 13],
        "sigmoid of class 1 alone",
    ),
    "softmax of a softmax": (
        changed(LOSS, ("(logits, labels)", "(logits.softmax(1), labels)")),
        [10, 11, 12, 13],
        "softmax of a softmax",
    ),
    "nothing gives NaN": (changed(LOSS, (" if len(logits) else logits.sum()", "")), [11], "NaN"),
    "nothing off the graph": (
        changed(LOSS, ("else logits.sum()", "else torch.tensor(0.0)")),
        [11],
        "does not hang on the graph",
    ),
}
