"""Branches on cached rows: however they are grown and copied, they are one forward of their text.

Shapes: B batch, L length, D width, W tokens of one branch.
"""

import pytest
import tiny
import torch
from tiny_run import ar_teacher

from mdm.train.teachers.ar import ARTeacher
from mdm.train.teachers.tree import Branch, Tree, _pack

V = 7
FLOAT64 = {"atol": 1e-10, "rtol": 0}
FLOAT32 = {"atol": 1e-5, "rtol": 0}
X0 = [[0, 3, 1, 4, 2, 2, 6, 5], [1, 1, 3, 0, 4, 5, 2, 2], [5, 0, 2, 3, 3, 6, 1, 1]]
IDS = [[0] * 8, [0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, -1, -1]]
FIRST = [[0] * 8, [0, 0, 0, 3, 3, 3, 3, 3], [0, 0, 0, 0, 4, 4, 6, 6]]


def tiny_teacher(family="llama"):
    capped = {"final_logit_softcapping": 5.0} if family == "gemma3" else {}
    options = {"layers": 2, "hidden": 16, "dtype": torch.float64, **capped}
    return ar_teacher(tiny.tiny_model(family, V, **options))


def everywhere(ids=IDS):
    """All positions that have something to their left."""
    ids_BL = torch.tensor(ids)
    asked_BL = torch.zeros_like(ids_BL).bool()
    asked_BL[:, 1:] = (ids_BL[:, 1:] == ids_BL[:, :-1]) & (ids_BL[:, 1:] >= 0)
    return asked_BL


@torch.no_grad()
def new_tree(teacher, x0=X0, ids=IDS):
    return Tree(teacher, torch.tensor(x0), torch.tensor(ids), everywhere(ids))


@torch.no_grad()
def log_probs(teacher, rows_WD):
    """In the precision of the model where it has a plain head."""
    if teacher.plain_head:
        return teacher.model.get_output_embeddings()(rows_WD).log_softmax(-1)
    return rows_WD.log_softmax(-1)


@torch.no_grad()
def extend(tree, branches, texts):
    return tree.extend(branches, [torch.tensor(text) for text in texts])


def assert_is_one_forward(teacher, branch, text, rows_WD, tolerance=FLOAT64):
    """The last outputs of a branch with this whole text are those of one row without a cache."""
    prefix = X0[branch.row][FIRST[branch.row][branch.start] : branch.start]
    with torch.no_grad():
        logits_LV = teacher.model(torch.tensor([[*prefix, *text]]), use_cache=False).logits[0]
    want_WV = logits_LV.log_softmax(-1)[-len(rows_WD) :]
    torch.testing.assert_close(log_probs(teacher, rows_WD), want_WV, **tolerance)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma3"])
def test_the_trunk_predicts_from_the_clean_tokens_of_the_document(family):
    teacher = tiny_teacher(family)
    tree = new_tree(teacher)
    tolerance = FLOAT32 if family == "gemma3" else FLOAT64
    for row, position in everywhere().nonzero().tolist():
        branch = tree.branch(row, position)
        assert (branch.row, branch.start, branch.length) == (row, position, 0)
        assert_is_one_forward(teacher, branch, [], tree.trunk(row, position), tolerance)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma3"])
@pytest.mark.parametrize("seed", range(3))
def test_any_history_is_one_forward(family, seed):
    """Grown in pieces, copied, left for a while, taken up again: a branch stays what it was."""
    teacher = tiny_teacher(family)
    tree = new_tree(teacher)
    random = torch.Generator().manual_seed(seed)

    def some(limit):
        return int(torch.randint(limit, (), generator=random))

    tolerance = FLOAT32 if family == "gemma3" else FLOAT64
    starts = everywhere().nonzero().tolist()
    alive = [(tree.branch(*starts[some(len(starts))]), []) for _ in range(4)]
    for step in range(8):
        chosen = [alive[some(len(alive))] for _ in range(1 + some(5))]  # copies among them
        new = [torch.randint(V, (1 + some(3),), generator=random).tolist() for _ in chosen]
        grown, rows = extend(tree, [branch for branch, _ in chosen], new)
        for branch, (stem, old), text, rows_WD in zip(grown, chosen, new, rows, strict=True):
            assert branch.row == stem.row
            assert (branch.start, branch.length) == (stem.start, stem.length + len(text))
            assert len(rows_WD) == len(text)
            assert_is_one_forward(teacher, branch, [*old, *text], rows_WD, tolerance)
            alive.append((branch, [*old, *text]))
        if step == 5:
            alive = [(tree.branch(*starts[some(len(starts))]), []), *alive[::3]]


@pytest.mark.parametrize("pieces", [[1, 1, 1, 1, 1], [2, 3], [4, 1], [5]])
def test_pieces_are_the_whole(pieces):
    teacher = tiny_teacher()
    tree = new_tree(teacher)
    text, branch, outputs = [3, 6, 0, 2, 5], tree.branch(1, 5), []
    for size in pieces:
        done = branch.length
        (branch,), (rows_WD,) = extend(tree, [branch], [text[done : done + size]])
        outputs.append(rows_WD)
    assert_is_one_forward(teacher, branch, text, torch.cat(outputs))


def test_a_branch_holds_its_own_tokens_and_the_trunk_stays_as_it_was():
    tree = new_tree(tiny_teacher())
    before = [(layer.keys.clone(), layer.values.clone()) for layer in tree._trunk.layers]
    grown, _ = extend(tree, [tree.branch(0, 3), tree.branch(1, 5)], [[1, 2], [4]])
    again, _ = extend(tree, [grown[0], grown[0]], [[5], [6, 6]])
    assert [branch.length for branch in (*grown, *again)] == [2, 1, 3, 4]
    for branch in (*grown, *again):
        # No view of a larger tensor, which would keep the others' memory alive.
        assert branch.memory.shape[3] == branch.length
        assert branch.memory.untyped_storage().nbytes() == 8 * branch.memory.numel()
    for layer, (keys, values) in zip(tree._trunk.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


# --- copies --------------------------------------------------------------------------------------------


@pytest.fixture
def fed(monkeypatch):
    """Of each forward: its tokens, padding included, and those that are none."""
    counts, call = [], ARTeacher.call

    def counted(self, x_BL, outputs_BL, cache, **layout):
        counts.append((x_BL.numel(), int(outputs_BL.sum())))
        return call(self, x_BL, outputs_BL, cache, **layout)

    monkeypatch.setattr(ARTeacher, "call", counted)
    return counts


def used(counts):
    """Tokens that were fed in all since the last time."""
    total = sum(real for _, real in counts)
    counts.clear()
    return total


def test_equal_copies_are_fed_once(fed):
    teacher = tiny_teacher()
    tree = new_tree(teacher)
    stem = tree.branch(0, 2)
    fed.clear()
    texts = [[1, 2], [3], [1, 2], [1, 2], [3]]
    grown, rows = extend(tree, [stem] * 5, texts)
    assert used(fed) == 3
    assert grown[0] is grown[2] is grown[3]
    assert grown[1] is grown[4]
    for branch, text, rows_WD in zip(grown, texts, rows, strict=True):
        assert_is_one_forward(teacher, branch, text, rows_WD)
    # They grow apart, and only what differs costs.
    again, rows = extend(tree, grown, [[0], [0], [0], [5], [0]])
    assert used(fed) == 3
    assert again[0] is again[2]
    for branch, text, last, rows_WD in zip(again, texts, [0, 0, 0, 5, 0], rows, strict=True):
        assert_is_one_forward(teacher, branch, [*text, last], rows_WD)


def test_equal_tokens_at_other_places_are_no_copies(fed):
    tree = new_tree(tiny_teacher())
    stems = [tree.branch(0, 2), tree.branch(0, 3), tree.branch(1, 2)]
    fed.clear()
    _, rows = extend(tree, stems, [[1, 2]] * 3)
    assert used(fed) == 6
    assert not torch.allclose(rows[0], rows[1])
    assert not torch.allclose(rows[0], rows[2])


def test_resampled_branches_go_on_from_their_parents():
    teacher = tiny_teacher()
    tree = new_tree(teacher)
    texts = [[1], [2], [3], [4]]
    branches, _ = extend(tree, [tree.branch(2, 1)] * 4, texts)
    for parents in ([1, 1, 0, 3], [2, 2, 2, 2], [0, 1, 3, 3]):
        branches = [branches[parent] for parent in parents]
        texts = [[*texts[parent], 5 - number] for number, parent in enumerate(parents)]
        branches, rows = extend(tree, branches, [text[-1:] for text in texts])
        for branch, text, rows_WD in zip(branches, texts, rows, strict=True):
            assert_is_one_forward(teacher, branch, text, rows_WD)


# --- rows do not know one another ------------------------------------------------------------------------


def test_order_of_rows_and_side_of_padding_change_nothing():
    teacher = tiny_teacher()
    text = [4, 4, 1]
    rows = []
    for x0, ids, row, start in (
        ([X0[0]], [[0] * 8], 0, 4),
        ([X0[1], X0[0]], [IDS[1], [0] * 8], 1, 4),
        ([[*X0[0], 6, 6]], [[0] * 8 + [-1] * 2], 0, 4),
        ([[6, 6, *X0[0]]], [[-1] * 2 + [0] * 8], 0, 6),
        ([[*X0[1], *X0[0]]], [[0] * 8 + [1] * 8], 0, 12),
    ):
        with torch.no_grad():
            tree = Tree(teacher, torch.tensor(x0), torch.tensor(ids), everywhere(ids))
        _, (rows_WD,) = extend(tree, [tree.branch(row, start)], [text])
        rows.append(torch.cat([tree.trunk(row, start), rows_WD]))
    for other in rows[1:]:
        torch.testing.assert_close(other, rows[0], **FLOAT64)


def test_branches_of_unequal_length_and_rows_of_unequal_work(fed):
    """One row has many branches, one none, one a long one; less than half of a forward is padding."""
    teacher = tiny_teacher()
    tree = new_tree(teacher)
    fed.clear()
    stems = [tree.branch(2, 5), tree.branch(0, 1), tree.branch(0, 7), tree.branch(0, 1)]
    texts = [[1, 2, 3, 4, 5, 6], [2], [3, 3], [1]]
    grown, rows = extend(tree, stems, texts)
    for branch, text, rows_WD in zip(grown, texts, rows, strict=True):
        assert_is_one_forward(teacher, branch, text, rows_WD)
    assert all(real > count / 2 for count, real in fed)
    assert used(fed) == sum(map(len, texts))


def test_padding_stays_within_the_positions_of_the_model():
    """A row as long as the model allows, with learned positions: padding behind it has none."""
    model = tiny.tiny_model("gpt2", V, layers=1, hidden=16, dtype=torch.float64, n_positions=8)
    teacher = ar_teacher(model)
    tree = new_tree(teacher)
    stems, texts = [tree.branch(0, 4), tree.branch(0, 1)], [[1, 2, 3, 4], [6, 5, 4, 3, 2, 1, 0]]
    grown, rows = extend(tree, stems, texts)
    for branch, text, rows_WD in zip(grown, texts, rows, strict=True):
        assert_is_one_forward(teacher, branch, text, rows_WD)


def test_something_must_stand_before_a_branch():
    tree = new_tree(tiny_teacher())
    for row, position in ((0, 0), (1, 3), (2, 4)):
        with pytest.raises(AssertionError, match="nothing stands to the left"):
            tree.branch(row, position)
        with pytest.raises(AssertionError, match="not asked for"):
            tree.trunk(row, position)


def test_branches_share_a_row_while_they_are_no_longer_than_the_longest_prefix():
    def packed(*branches):
        return _pack([Branch(row, start) for row, start, _ in branches],
                     [torch.zeros(count) for *_, count in branches])  # fmt: skip

    assert packed((0, 6, 3), (0, 6, 3), (0, 6, 3)) == [[0, 1], [2]]
    # The room is that of the longest prefix for all, or rows would differ and be padded.
    assert packed((0, 2, 3), (0, 6, 3)) == [[0, 1]]
    assert packed((1, 6, 1), (0, 6, 1), (1, 6, 1)) == [[1], [0, 2]]
    assert packed((0, 2, 9), (0, 2, 9)) == [[0], [1]]
