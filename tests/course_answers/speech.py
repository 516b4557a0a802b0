"""Answers to an assignment: code that runs after the library's own functions and replaces some."""

RIGHT = {  # right, and written differently
    "loops": """
def frame_mask(lengths, x):
    table = torch.zeros(x.shape[0], x.shape[1], dtype=torch.bool, device=x.device)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            table[b, t] = lengths is None or t < int(lengths[b])
    return table


def peak(tokens, mask):
    rows = []
    for b in range(tokens.shape[0]):
        best = tokens.new_zeros(tokens.shape[2])
        for t in range(tokens.shape[1]):
            if mask is None or mask[b, t]:
                best = torch.maximum(best, tokens[b, t])
        rows.append(best)
    return torch.stack(rows)
""",
    "sums": """
def masked_norm(self, x, mask):
    inside = mask.unsqueeze(-1)
    x, n = x.masked_fill(~inside, 0.0), int(mask.sum())
    mean, var = self.running_mean, self.running_var
    if self.training and n > 1:
        mean = x.sum((0, 1)) / n
        var = ((x - mean).masked_fill(~inside, 0.0) ** 2).sum((0, 1)) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
    return ((x - mean) / (var + self.eps).sqrt() * self.weight + self.bias).masked_fill(
        ~inside, 0.0
    )


MaskedBatchNorm.forward = masked_norm


def half(self, x, mask):
    keep = torch.tensor([2 * j for j in range((x.shape[1] + 1) // 2)])
    mask = mask[:, keep]
    first = torch.nn.GELU()(self.norm_down(self.down(x.transpose(1, 2)).transpose(1, 2), mask))
    second = torch.nn.GELU()(self.norm_same(self.same(first.transpose(1, 2)).transpose(1, 2), mask))
    return second + first, mask


ConvBlock.forward = half


def peak(tokens, mask):
    if mask is not None:
        tokens = torch.where(mask[..., None], tokens, torch.full_like(tokens, -torch.inf))
    return tokens.max(dim=1)[0].clamp_min(0)
""",
    "one list": """
def frame_mask(lengths, x):
    if lengths is None:
        lengths = [x.shape[1]] * x.shape[0]
    return (
        torch.stack(
            [torch.cat([torch.ones(int(n)), torch.zeros(x.shape[1] - int(n))]) for n in lengths]
        )
        == 1
    )


def masked_norm(self, x, mask):
    out, rows = torch.zeros_like(x), x[mask]
    training = self.training and rows.shape[0] > 1
    out[mask] = nn.functional.batch_norm(
        rows,
        self.running_mean,
        self.running_var,
        self.weight,
        self.bias,
        training,
        self.momentum,
        self.eps,
    )
    return out


MaskedBatchNorm.forward = masked_norm
""",
}

NORM = """
def masked_norm(self, x, mask):
    rows = x[mask]
    {single}
        mean, var = self.running_mean, self.running_var
        rows = F.batch_norm(rows, mean, var, self.weight, self.bias, False, 0.0, self.eps)
    else:
        rows = nn.BatchNorm1d.forward(self, rows)
    return {result}


MaskedBatchNorm.forward = masked_norm
"""
BLOCK = """
def half(self, x, mask):
    short = {mask}
    first = {first}
    second = {second}
    return {result}, short


ConvBlock.forward = half
"""
STEPS = {
    "mask": "mask[:, ::2]",
    "first": "F.gelu(self.norm_down(self.over_time(self.down, x), short))",
    "second": "F.gelu(self.norm_same(self.over_time(self.same, first), short))",
    "result": "first + second",
}

WRONG = {  # name: (code, numbers of the checks that it must fail, part of a message)
    "one frame more": (
        """
def frame_mask(lengths, x):
    positions = torch.arange(x.shape[1])
    return (
        positions <= lengths[:, None]
        if lengths is not None
        else torch.ones(x.shape[:2], dtype=torch.bool)
    )
""",
        [1, 2],
        "one frame too many",
    ),
    "the other way round": (
        """
def frame_mask(lengths, x):
    positions = torch.arange(x.shape[1])
    return (
        positions >= lengths[:, None]
        if lengths is not None
        else torch.ones(x.shape[:2], dtype=torch.bool)
    )
""",
        [1, 2],
        "True means that a frame counts",
    ),
    "lengths needed": (
        """
def frame_mask(lengths, x):
    return torch.arange(x.shape[1]) < lengths[:, None]
""",
        [1, 2],
        "TypeError",
    ),
    "ones and zeros": (
        """
def frame_mask(lengths, x):
    if lengths is None:
        return torch.ones(x.shape[:2])
    return (torch.arange(x.shape[1]) < lengths[:, None]).float()
""",
        [1, 2],
        "should be torch.bool",
    ),
    "plain batch norm": (
        """
def plain_norm(self, x, mask):
    x = nn.BatchNorm1d.forward(self, x.transpose(1, 2)).transpose(1, 2)
    return clean(x, mask)


MaskedBatchNorm.forward = plain_norm
""",
        [3, 4, 5, 6, 7, 9, 11],
        "take statistics from valid frames alone",
    ),
    "padding zero, and counted": (
        """
def plain_norm(self, x, mask):
    x = nn.BatchNorm1d.forward(self, clean(x, mask).transpose(1, 2)).transpose(1, 2)
    return clean(x, mask)


MaskedBatchNorm.forward = plain_norm
""",
        [3, 4, 5, 6, 7, 9, 11],
        "the zero counts",
    ),
    "multiplied by the mask": (
        """
def times_mask(self, x, mask):
    inside, n = mask.unsqueeze(-1).float(), mask.sum()
    mean, var = self.running_mean, self.running_var
    if self.training and n > 1:
        mean = (x * inside).sum((0, 1)) / n
        var = ((x - mean) ** 2 * inside).sum((0, 1)) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
    return ((x - mean) / (var + self.eps).sqrt() * self.weight + self.bias) * inside


MaskedBatchNorm.forward = times_mask
""",
        [3, 7],
        "there is a NaN",
    ),
    "one frame refused": (
        NORM.format(
            single="if False:",
            result="rows.new_zeros(x.shape).masked_scatter(mask[..., None], rows)",
        ),
        [5, 11],
        "Expected more than 1 value",
    ),
    "one frame normalised": (
        NORM.format(
            single="if self.training and len(rows) == 1:\n        rows = 0 * rows\n    elif False:",
            result="rows.new_zeros(x.shape).masked_scatter(mask[..., None], rows)",
        ),
        [5],
        "one frame has no variance",
    ),
    "padding as it was": (
        NORM.format(
            single="if self.training and len(rows) == 1:",
            result="x.masked_scatter(mask[..., None], rows)",
        ),
        [3, 4, 5, 6, 7, 8, 9, 10, 11],
        "should be 0",
    ),
    "padding holds the bias": (
        NORM.format(
            single="if self.training and len(rows) == 1:",
            result="self.bias.expand(x.shape).masked_scatter(mask[..., None], rows)",
        ),
        [6],
        "Padding holds the bias",
    ),
    "statistics cut off, and standing still": (
        """
def own_norm(self, x, mask):
    rows = x[mask]
    mean, var = self.running_mean, self.running_var
    if self.training and len(rows) > 1:
        mean, var = rows.mean(0).detach(), rows.var(0, unbiased=False).detach()
    rows = (rows - mean) / (var + self.eps).sqrt() * self.weight + self.bias
    return rows.new_zeros(x.shape).masked_scatter(mask[..., None], rows)


MaskedBatchNorm.forward = own_norm
""",
        [4, 6, 7],
        "in training they move on",
    ),
    "halves rounded": (
        BLOCK.format(
            **STEPS
            | {
                "mask": (
                    "torch.stack([torch.arange((x.shape[1] + 1) // 2) < round(int(n) / 2) "
                    "for n in mask.sum(1)])"
                )
            }
        ),
        [8, 10, 11],
        "Halves were rounded down",
    ),
    "the other half": (
        BLOCK.format(
            **STEPS | {"mask": "F.pad(mask, (0, 1))[:, 1::2][:, : (x.shape[1] + 1) // 2]"}
        ),
        [8, 10, 11],
        "Halves were rounded down",
    ),
    "norms count padding": (
        BLOCK.format(
            **STEPS
            | {
                "first": (
                    "F.gelu(self.norm_down(self.over_time(self.down, x), torch.ones_like(short)))"
                ),
                "second": (
                    "clean(F.gelu(self.norm_same(self.over_time(self.same, first), "
                    "torch.ones_like(short))), short)"
                ),
                "result": "clean(first, short) + second",
            }
        ),
        [9, 10],
        "padding counts in a norm",
    ),
    "no short cut": (BLOCK.format(**STEPS | {"result": "second"}), [10], "short cut is missing"),
    "no second GELU": (
        BLOCK.format(
            **STEPS | {"second": "self.norm_same(self.over_time(self.same, first), short)"}
        ),
        [10],
        "GELU of the second step is missing",
    ),
    "no norms": (
        BLOCK.format(
            **STEPS
            | {
                "first": "clean(F.gelu(self.over_time(self.down, x)), short)",
                "second": "clean(F.gelu(self.over_time(self.same, first)), short)",
            }
        ),
        [10],
        "Both norms are missing",
    ),
    "mean": (
        """
def peak(tokens, mask):
    if mask is None:
        return tokens.mean(1)
    return clean(tokens, mask).sum(1) / mask.sum(1, keepdim=True)
""",
        [12, 13, 14],
        "This is the mean",
    ),
    "peak below zero": (
        """
def peak(tokens, mask):
    return (
        tokens.amax(1) if mask is None else tokens.masked_fill(~mask[..., None], -torch.inf).amax(1)
    )
""",
        [12, 13, 14],
        "at least 0",
    ),
    "padding is the peak": (
        """
def peak(tokens, mask):
    return tokens.amax(1).relu()
""",
        [12, 13, 14],
        "Padding is the peak",
    ),
    "peak times mask": (
        """
def peak(tokens, mask):
    return (tokens if mask is None else tokens * mask[..., None]).amax(1).relu()
""",
        [13, 14],
        "NaN",
    ),
}
