"""Answers to an assignment: code that runs after the library's own functions and replaces some."""

RIGHT = {  # right, and written differently
    "loops": """
def update_momentum(teacher, student, momentum):
    if momentum < 0 or momentum > 1:
        raise ValueError("momentum")
    numbers, states = _paired(teacher, student, "parameters"), _paired(teacher, student, "buffers")
    if any(mine.dtype in (torch.half, torch.bfloat16) for mine, _ in numbers):
        raise ValueError("half precision")
    for mine, other in numbers:
        mine.data.mul_(momentum).add_(other.detach().to(mine.dtype), alpha=1 - momentum)
    for mine, other in states:
        mine.data.copy_(other)


def ring_slots(pointer, n, size):
    places = {}
    for item in range(n):
        places[(int(pointer) + item) % size] = item
    pairs = sorted((item, slot) for slot, item in places.items())
    return torch.tensor([item for item, _ in pairs], dtype=torch.long), torch.tensor(
        [slot for _, slot in pairs], dtype=torch.long
    )


def enqueue(self, speech, image, ids):
    self.check(speech, image, ids)
    for i in range(len(ids) if self.size else 0):
        slot = int(self.pointer)
        self.speech[slot], self.image[slot], self.ids[slot] = (
            speech[i].detach(),
            image[i].detach(),
            ids[i],
        )
        self.pointer.fill_((slot + 1) % self.size)


def filled(self):
    used = [slot for slot, number in enumerate(self.ids.tolist()) if number != -1]
    return self.speech[used], self.image[used], self.ids[used]


EmbeddingQueue.enqueue, EmbeddingQueue.filled = enqueue, filled
""",
    "state dict": """
def update_momentum(teacher, student, momentum):
    if not 0 <= momentum <= 1:
        raise ValueError("momentum")
    if [(name, one.shape) for name, one in teacher.state_dict().items()] != [
        (name, one.shape) for name, one in student.state_dict().items()
    ]:
        raise ValueError("not the same network")
    if any(one.dtype in (torch.float16, torch.bfloat16) for one in teacher.parameters()):
        raise ValueError("half precision")
    learnt, now = dict(teacher.named_parameters()), student.state_dict()
    teacher.load_state_dict(
        {
            name: momentum * old + (1 - momentum) * now[name].float()
            if name in learnt
            else now[name]
            for name, old in teacher.state_dict().items()
        }
    )


def ring_slots(pointer, n, size):
    survivors = torch.arange(n)[-size:]
    return survivors, torch.remainder(survivors + pointer, size)


def enqueue(self, speech, image, ids):
    self.check(speech, image, ids)
    if not self.size:
        return
    with torch.no_grad():
        which, where = ring_slots(self.pointer, len(ids), self.size)
        for name, values in {"speech": speech, "image": image, "ids": ids}.items():
            ring = getattr(self, name).clone()
            ring[where] = values[which].to(ring.dtype)
            setattr(self, name, ring)
        self.pointer = (self.pointer + len(ids)) % self.size


def filled(self):
    slots = (self.ids >= 0).nonzero().flatten()
    return tuple(torch.index_select(ring, 0, slots) for ring in (self.speech, self.image, self.ids))


EmbeddingQueue.enqueue, EmbeddingQueue.filled = enqueue, filled
""",
}

HEAD = """
@torch.no_grad()
def update_momentum(teacher, student, momentum):
    if not 0 <= momentum <= 1:
        raise ValueError("momentum")
    parameters, buffers = (
        _paired(teacher, student, "parameters"),
        _paired(teacher, student, "buffers"),
    )
    if any(slow.dtype in (torch.float16, torch.bfloat16) for slow, _ in parameters):
        raise ValueError("half precision")
"""
ENQUEUE = """
@torch.no_grad()
def enqueue(self, speech, image, ids):
    self.check(speech, image, ids)
    if self.size == 0:
        return
"""

WRONG = {  # name: (code, numbers of the checks that it must fail, part of a message)
    "momentum on the wrong term": (
        HEAD
        + """
    for slow, fast in parameters:
        slow.copy_((1 - momentum) * slow + momentum * fast)
    for slow, fast in buffers:
        slow.copy_(fast)
""",
        [1, 4, 5],
        "momentum is on the wrong term",
    ),
    "replaced, not changed in place": (
        HEAD
        + """
    for slow, fast in parameters:
        slow = momentum * slow + (1 - momentum) * fast
    for slow, fast in buffers:
        slow = fast.clone()
""",
        [1, 2, 4, 5],
        "must be changed in place",
    ),
    "buffers averaged": (
        HEAD
        + """
    for slow, fast in parameters + buffers:
        slow.copy_(momentum * slow + (1 - momentum) * fast)
""",
        [2],
        "Buffers are averaged",
    ),
    "buffers forgotten": (
        HEAD
        + """
    for slow, fast in parameters:
        slow.mul_(momentum).add_(fast, alpha=1 - momentum)
""",
        [2],
        "Buffers are forgotten",
    ),
    "gradients recorded": (
        HEAD.replace("@torch.no_grad()\n", "")
        + """
    for slow, fast in parameters:
        slow.mul_(momentum).add_(fast, alpha=1 - momentum)
    for slow, fast in buffers:
        slow.copy_(fast)
""",
        [1],
        "inside torch.no_grad()",
    ),
    "the student follows": (
        HEAD
        + """
    for slow, fast in parameters:
        fast.lerp_(slow.to(fast), 1 - momentum)
    for slow, fast in buffers:
        slow.copy_(fast)
""",
        [1, 4, 5],
        "the student must not be changed",
    ),
    "in half precision": (
        HEAD
        + """
    for slow, fast in parameters:
        slow.copy_(momentum * slow.to(fast.dtype) + (1 - momentum) * fast)
    for slow, fast in buffers:
        slow.copy_(fast)
""",
        [5],
        "rounded away in half precision",
    ),
    "zip stops early": (
        """
@torch.no_grad()
def update_momentum(teacher, student, momentum):
    for slow, fast in zip(teacher.parameters(), student.parameters()):
        slow.mul_(momentum).add_(fast, alpha=1 - momentum)
    for slow, fast in zip(teacher.buffers(), student.buffers()):
        slow.copy_(fast)
""",
        [3],
        "is accepted",
    ),
    "slots off by one": (
        """
def ring_slots(pointer, n, size):
    newest = torch.arange(max(0, n - size), n)
    return newest, (pointer + 1 + newest) % size
""",
        [6, 7, 8, 9, 12, 13],
        "off by one",
    ),
    "slots not wrapped": (
        """
def ring_slots(pointer, n, size):
    newest = torch.arange(max(0, n - size), n)
    return newest, pointer + newest
""",
        [6, 7, 8, 9, 12],
        "runs out of the ring",
    ),
    "the first survive": (
        """
def ring_slots(pointer, n, size):
    newest = torch.arange(min(n, size))
    return newest, (pointer + newest) % size
""",
        [7, 8, 9, 12],
        "the last ones must survive",
    ),
    "survivors moved to the pointer": (
        """
def ring_slots(pointer, n, size):
    newest = torch.arange(max(0, n - size), n)
    return newest, (pointer + torch.arange(len(newest))) % size
""",
        [7, 8, 9, 12],
        "item i belongs to slot pointer + i",
    ),
    "pointer not wrapped": (
        ENQUEUE
        + """
    newest, slots = ring_slots(self.pointer, len(ids), self.size)
    for ring, values in ((self.speech, speech), (self.image, image), (self.ids, ids)):
        ring[slots] = values[newest].to(ring)
    self.pointer += len(ids)


EmbeddingQueue.enqueue = enqueue
""",
        [9, 12],
        "pointer runs out of the ring",
    ),
    "pointer moved by the survivors": (
        ENQUEUE
        + """
    newest, slots = ring_slots(self.pointer, len(ids), self.size)
    for ring, values in ((self.speech, speech), (self.image, image), (self.ids, ids)):
        ring[slots] = values[newest].to(ring)
    self.pointer.copy_((self.pointer + len(newest)) % self.size)


EmbeddingQueue.enqueue = enqueue
""",
        [9, 12],
        "pointer after 13 items",
    ),
    "shifted": (
        ENQUEUE
        + """
    self.speech = torch.cat([self.speech, speech.float()])[-self.size :]
    self.image = torch.cat([self.image, image.float()])[-self.size :]
    self.ids = torch.cat([self.ids, ids.long()])[-self.size :]
    self.pointer.copy_((self.pointer + len(ids)) % self.size)


EmbeddingQueue.enqueue = enqueue
""",
        [9, 12, 13],
        "the entries are shifted",
    ),
    "speech and image exchanged": (
        ENQUEUE
        + """
    newest, slots = ring_slots(self.pointer, len(ids), self.size)
    for ring, values in ((self.image, speech), (self.speech, image), (self.ids, ids)):
        ring[slots] = values[newest].to(ring)
    self.pointer.copy_((self.pointer + len(ids)) % self.size)


EmbeddingQueue.enqueue = enqueue
""",
        [10, 12, 13],
        "Speech and image are exchanged",
    ),
    "gradients kept": (
        ENQUEUE.replace("@torch.no_grad()\n", "")
        + """
    newest, slots = ring_slots(self.pointer, len(ids), self.size)
    for ring, values in ((self.speech, speech), (self.image, image), (self.ids, ids)):
        ring[slots] = values[newest].to(ring)
    self.pointer.copy_((self.pointer + len(ids)) % self.size)


EmbeddingQueue.enqueue = enqueue
""",
        [13],
        "carries a gradient",
    ),
    "nothing refused": (
        """
@torch.no_grad()
def enqueue(self, speech, image, ids):
    if self.size:
        newest, slots = ring_slots(self.pointer, len(ids), self.size)
        for ring, values in ((self.speech, speech), (self.image, image), (self.ids, ids)):
            ring[slots] = values[newest].to(ring)
        self.pointer.copy_((self.pointer + len(ids)) % self.size)


EmbeddingQueue.enqueue = enqueue
""",
        [11],
        "is accepted",
    ),
    "empty slots are keys": (
        """
EmbeddingQueue.filled = lambda self: (self.speech, self.image, self.ids)
""",
        [10, 12],
        "an empty slot has the id -1",
    ),
}
