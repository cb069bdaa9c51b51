"""Spans: what an alignment promises, for tokenizers of every kind on any text, and which objective its gradient is of."""

import random
from collections import defaultdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from span_helpers import EXACT, LOSSY, Toy, available, corpus, make_aligner, make_tokenizer, token_bytes

from opd.data.spans import Aligner, Alignment, Unscored, read_bytes
from opd.data.token_bytes import TokenBytes, check_student, check_teacher, longer_tokens
from opd.errors import ConfigError
from opd.objective import Clips, Head, Sampled, ScoredSpans, chunked_loss, sampled, sum_over_spans
from opd.objective.head import chunks

HARD = [
    "naïve café — “quoted” … 12,345.678", "x = {'a': [1, 2, 3]}\n\tif x:\n\t\treturn x  # ok\r\n", "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽", "مرحبا بالعالم ١٢٣",
    "שָׁלוֹם עולם", "é vs é, ẛ̣ ẛ̣", "     leading, trailing     ", "\n\n\n\t\t  \n", "日本語のテキスト、中文文本。한국어", "ﬁ ﬂ ﷺ ½ ① Å",
    "<eos><|im_end|></s><0x0A>▁Ġ", "a\u200bb\u00a0c\ufeffd\u2028e", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff", "aaaaaaaaaaaaaaaa", "\u202eabc\u202c", "� �",
    "½½½ 1/2 ²³", "don't won't I'LL 'tis", "https://example.org/a?b=c&d=%20#e", "0123456789 00 000 3.14e-10",
]  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from([*HARD, " ", "\n", "  ", "the", " the", "ab", "1"]), max_size=4).map("".join),
    st.text(alphabet="ab \n0é🙂\u0301", max_size=30),
)
NAMES = available(EXACT)
many = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def covered(found: Alignment, completion: list[int]) -> None:
    """Assert that spans follow each other without a gap on both sides and cover the completion."""
    stop = teacher_stop = 0
    for span in found.spans:
        assert (span.start, span.teacher_start) == (stop, teacher_stop) and span.stop > span.start
        assert span.teacher_stop > span.teacher_start or span.unscored
        stop, teacher_stop = span.stop, span.teacher_stop
    assert stop == len(completion) == len(found.following) and teacher_stop <= len(found.teacher_ids)


@many
@given(text=TEXTS, ours=st.sampled_from(NAMES), theirs=st.sampled_from(NAMES))
def test_spans_of_two_tokenizers_cover_the_bytes_exactly_once_and_are_the_shortest(text: str, ours: str, theirs: str) -> None:
    aligner, back = make_aligner(ours, theirs), make_aligner(theirs, ours)
    student, teacher = aligner.student.encode(text), aligner.teacher.encode(text)
    if not student.exact or not teacher.exact:
        return  # the bundled tokenizer normalizes
    completion = [*student.ids, aligner.end]
    found = aligner.align(completion, is_cut_off=False)
    covered(found, completion)
    assert found.teacher_ids == (*teacher.ids, aligner.teacher_end) == found.read
    assert len(found.spans) == len({*student.ends} & {*teacher.ends} - {0}) + 1
    assert not any(span.unscored for span in found.spans)
    for span in found.spans[:-1]:
        theirs_said = aligner.teacher.spelled(found.teacher_ids[span.teacher_start : span.teacher_stop])
        assert aligner.student.spelled(completion[span.start : span.stop]) == theirs_said
    if ours == theirs:
        assert all(span.is_one_to_one for span in found.spans)
    mirrored = back.align(found.teacher_ids, is_cut_off=False)
    assert [(span.teacher_start, span.teacher_stop, span.start, span.stop) for span in mirrored.spans] == [
        (span.start, span.stop, span.teacher_start, span.teacher_stop) for span in found.spans
    ]


@many
@given(data=st.data(), ours=st.sampled_from(NAMES), theirs=st.sampled_from([*NAMES, *LOSSY]), is_cut_off=st.booleans())
def test_of_any_ids_at_all_only_canonical_text_that_the_teacher_reads_unchanged_is_scored(data, ours, theirs, is_cut_off) -> None:
    """Tokens drawn at random are seldom canonical and seldom UTF-8, and control tokens are among them."""
    aligner = make_aligner(ours, theirs)
    completion = data.draw(st.lists(st.integers(0, len(aligner.student.pieces) - 1), max_size=12))
    found = aligner.align(completion, is_cut_off)
    covered(found, completion)
    for span in found.scored:
        said = aligner.student.spelled(completion[span.start : span.stop])
        if said is None:
            assert completion[span.start] == aligner.end and found.teacher_ids[span.teacher_start] == aligner.teacher_end
            continue
        begin = sum(len(aligner.student.pieces[token] or b"") for token in completion[: span.start])
        text = b"".join(piece or b"" for piece in map(aligner.student.piece, completion[: found.spans[-1].stop]))
        assert not {*range(begin, begin + len(said))} & {*read_bytes(text)[2]}
        assert aligner.teacher.says(found.teacher_ids[span.teacher_start : span.teacher_stop], said)


@many
@given(text=TEXTS, theirs=st.sampled_from(LOSSY))
def test_where_the_teachers_tokenizer_changes_the_text_nothing_is_learnt_and_the_rest_stays_aligned(text: str, theirs: str) -> None:
    aligner = make_aligner("gpt2", theirs)
    completion = [*aligner.student.encode(text).ids, aligner.end]
    found = aligner.align(completion, is_cut_off=False)
    covered(found, completion)
    assert {span.unscored for span in found.spans} <= {None, Unscored.illegible}


def test_a_changed_character_leaves_its_neighbours_alone() -> None:
    decomposed = "The cafe\u0301 is open."
    for theirs in LOSSY:
        aligner = make_aligner("gpt2", theirs)
        completion = aligner.student.encode(decomposed).ids
        found = aligner.align([*completion, aligner.end], is_cut_off=False)
        lost = [aligner.student.spelled(completion[span.start : span.stop]) for span in found.spans if span.unscored]
        assert "e\u0301".encode() in b"".join(lost) and len(b"".join(lost)) <= len(" cafe\u0301 is".encode()), (theirs, lost)
        assert len(found.scored) >= 4


@pytest.mark.parametrize(("ours", "theirs"), [("gpt2", "qwen"), ("qwen", "llama2"), ("llama2", "gpt2")])
def test_nothing_is_learnt_from_a_spelling_that_is_not_the_students_own(ours: str, theirs: str) -> None:
    aligner = make_aligner(ours, theirs)
    ids = aligner.student.encode("The argument of the parser, with its default value.").ids
    index_of = {piece: index for index, piece in enumerate(aligner.student.pieces) if piece is not None}
    place = max(range(len(ids)), key=lambda index: len(aligner.student.pieces[ids[index]]))
    letters = [index_of[bytes([byte])] for byte in aligner.student.pieces[ids[place]]]
    completion = [*ids[:place], *letters, *ids[place + 1 :], aligner.end]
    found = aligner.align(completion, is_cut_off=False)
    covered(found, completion)
    for span in found.spans:
        is_inside = span.start < place + len(letters) and span.stop > place
        assert span.unscored is (Unscored.not_canonical if is_inside else None)


def test_the_end_of_a_turn_is_learnt_and_no_other_control_token_nor_what_follows_it() -> None:
    one = make_aligner("gpt2", "gemma")
    start, unknown = (make_tokenizer("gpt2").convert_tokens_to_ids(token) for token in ("<s>", "<unk>"))
    aligner = Aligner(one.student, one.teacher, one.end, one.teacher_end, frozenset({one.end, start}))
    text = list(aligner.student.encode("Good.").ids)
    found = aligner.align([*text, aligner.end], is_cut_off=False)
    assert found.teacher_ids[-1] == aligner.teacher_end and found.spans[-1].is_one_to_one and len(found.scored) == len(found.spans)
    assert aligner.align([aligner.end], is_cut_off=False).teacher_ids == (aligner.teacher_end,)
    for control in (start, unknown):
        found = aligner.align([*text, control, *text], is_cut_off=False)
        assert found.following == [*aligner.align([*text, aligner.end], is_cut_off=False).following[:-1], *[-1] * (1 + len(text))]
        assert found.spans[-1].unscored is Unscored.unmapped
    spelled = aligner.student.encode("</s><s>").ids  # plain text that looks like control tokens
    assert not {0, 1, 2} & {*aligner.align(spelled, is_cut_off=False).teacher_ids}


def test_bytes_that_are_no_text_are_not_learnt_and_an_unfinished_character_is_dropped() -> None:
    aligner = make_aligner("bundled", "gpt2")
    index_of = {piece: index for index, piece in enumerate(aligner.student.pieces) if piece is not None}
    completion = [index_of[bytes([byte])] for byte in b"the \xff end \xe2\x82"]
    found = aligner.align(completion, is_cut_off=True)
    covered(found, completion)
    assert aligner.teacher.spelled(found.teacher_ids) == "the � end ".encode()
    why = {span.unscored for span in found.spans if span.start <= 4 < span.stop}
    assert why == {Unscored.illegible} and found.spans[-1].unscored is Unscored.unsettled
    ended = aligner.align([*completion, aligner.end], is_cut_off=False)
    assert ended.spans[-1].unscored is Unscored.illegible and ended.spans[-1].stop == len(completion) + 1


@given(raw=st.one_of(st.binary(max_size=12), st.text(max_size=6).map(str.encode)), cut=st.integers(0, 4))
def test_each_byte_of_a_text_knows_where_it_was(raw: bytes, cut: int) -> None:
    raw = raw[: len(raw) - cut]
    text, places, bad = read_bytes(raw)
    encoded = text.encode()
    assert len(places) == len(encoded) + 1 and places[0] == 0 and len(raw) - places[-1] <= 3
    kept = [(index, place) for index, place in enumerate(places[:-1]) if place >= 0 and place not in bad]
    assert all(encoded[index] == raw[place] for index, place in kept)
    assert sorted([place for _, place in kept] + [*bad]) == list(range(places[-1]))


def test_the_settled_spans_of_a_completion_that_was_cut_off_are_those_of_the_whole() -> None:
    generator = random.Random(0)
    lines = [line for line in corpus() if len(line) > 20]
    broken, total = dict.fromkeys((True, False), 0), dict.fromkeys((True, False), 0)
    for ours, theirs in [("gpt2", "gemma"), ("gemma", "gpt2"), ("qwen", "llama2"), ("bundled", "qwen")]:
        aligner = make_aligner(ours, theirs)
        for line in generator.sample(lines, 60):
            ids = aligner.student.encode(line).ids
            whole = {(span.start, span.stop) for span in aligner.align([*ids, aligner.end], is_cut_off=False).spans}
            for span in aligner.align(ids[: generator.randint(1, len(ids))], is_cut_off=True).spans:
                is_settled = span.unscored is None
                total[is_settled] += 1
                broken[is_settled] += (span.start, span.stop) not in whole
    assert total[True] > 500 and broken[True] == 0
    assert broken[False] > 0.1 * total[False]  # so that the rule is needed


def test_a_span_that_the_mask_cuts_and_what_the_teacher_has_no_position_for_are_not_scored() -> None:
    aligner = make_aligner("bundled", "gpt2")
    completion = [*aligner.student.encode("the parser").ids, aligner.end]
    whole = aligner.align(completion, is_cut_off=False)
    long = next(span for span in whole.spans if span.stop - span.start > 1)
    mask = [offset < long.stop - 1 for offset in range(len(completion))]
    cut = whole.masked(mask)
    assert cut.following == [*whole.following[: long.start], *[-1] * (len(completion) - long.start)]
    narrow = Aligner(aligner.student, aligner.teacher, aligner.end, aligner.teacher_end, aligner.eos, limit=10)
    found = narrow.align(completion, is_cut_off=False, prompt=8)
    assert len(found.read) <= 2 < len(whole.read) and found.spans[-1].unscored is Unscored.unmapped


# Tokenizers that are refused.


def test_a_tokenizer_without_bytes_is_refused_as_the_student_and_one_that_changes_texts_as_the_teacher() -> None:
    for name in (*NAMES, "nfc", "unigram"):
        check_student(token_bytes(name))
    with pytest.raises(ConfigError, match=r"^teacher\.alignment=spans: the tokens of model\.path"):
        check_student(token_bytes("wordpiece"))
    for name in (*NAMES, "nfc", "wordpiece"):
        check_teacher(token_bytes(name), ())
    for name in ("lower case", "unigram"):
        with pytest.raises(ConfigError, match=r"^teacher\.alignment=spans: the tokenizer of teacher\.path changes \d+ of \d+ texts"):
            check_teacher(token_bytes(name), ())
    with pytest.raises(ConfigError, match=r"changes \d+ of \d+ texts"):  # <unk>
        check_teacher(token_bytes("wordpiece"), ["one ☃"] * 10)
    check_teacher(token_bytes("unigram"), ["one line of text"] * 1_000)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match=r"model\.path has a slow tokenizer .*tokenizer\.json"):
        TokenBytes(Slow(), "model")


# The objective.


def is_text(piece: bytes) -> bool:
    return piece.decode(errors="ignore").encode() == piece


def relative(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_expected_gradient_is_that_of_a_weighted_kl_of_actions_and_a_share_for_each_token_is_not(seed: int) -> None:
    """Enumerate all that the student can write: E[g] = -d/dtheta sum over spans u in states c of weight(c, u) (pi log(pi / m) - pi).

    weight is how often u is a scored span in c, over pi(u): how often c is visited and what follows confirms the end of u, held fixed.
    m(u) is the teacher's probability of its own tokens of u.
    """
    toy = Toy(seed)
    free = toy.logits.clone().requires_grad_()
    table = toy.student.table(free)
    probability = toy.student.total(toy.student.logp(toy.logits)).exp()
    visits: dict[tuple, float] = defaultdict(float)
    target: dict[tuple, float] = {}
    for ids, alignment, each in zip(toy.student.complete, toy.alignments, probability.tolist(), strict=True):
        for span in alignment.scored:
            action = ids[: span.start], ids[span.start : span.stop]
            visits[action] += each
            logp = toy.teacher_logp(alignment.teacher_ids, span.teacher_start, span.teacher_stop)
            assert abs(target.setdefault(action, logp) - logp) < 1e-12
    loss = torch.zeros((), dtype=torch.float64)
    for (state, action), visited in visits.items():
        logp = torch.stack([table[toy.student.place[(*state, *action[:at])], token] for at, token in enumerate(action)]).sum()
        loss = loss + visited / float(logp.detach().exp()) * (logp.exp() * (logp - target[state, action]) - logp.exp())
    (gradient,) = torch.autograd.grad(loss, free)
    advantage, size = toy.advantages()
    assert float(size.max()) > 1
    assert relative(toy.expected_gradient(advantage), -gradient) < 1e-12
    assert relative(toy.expected_gradient(advantage / size), -gradient) > 0.01
    assert relative(toy.expected_gradient(advantage * (size == 1)), -gradient) > 0.01


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_where_both_write_the_same_texts_equally_often_nothing_is_learnt_thanks_to_the_lookahead(seed: int) -> None:
    """A student that is right stays where it is: every span's advantage vanishes. Without the correction it is moved away."""
    toy = Toy(seed, agree=True)
    written = toy.student.total(toy.student.logp(toy.logits)).exp()[toy.student.sequence] > 1e-200
    corrected, plain = toy.advantages(corrected=True)[0][written], toy.advantages()[0][written]
    assert float(corrected.abs().max()) < 1e-9 and float(plain.abs().max()) > 0.3
    assert float(toy.expected_gradient(toy.advantages(corrected=True)[0]).norm()) < 1e-9
    assert float(toy.expected_gradient(toy.advantages()[0]).norm()) > 0.05


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_student_is_not_drawn_to_what_is_not_scored(seed: int) -> None:
    """Advantages are negative on average. With 0 for tokens that are not scored, a step writes more of them than with the mean."""
    toy = Toy(seed)
    advantage, _ = toy.advantages(corrected=True)
    probability = toy.student.total(toy.student.logp(toy.logits)).exp()[toy.student.sequence]
    is_scored = torch.cat([torch.tensor(alignment.following) for alignment in toy.alignments]) >= 0
    mean = float((probability * advantage)[is_scored].sum() / probability[is_scored].sum())
    assert mean < -0.1 and 0.05 < float(probability[~is_scored].sum() / probability.sum()) < 0.6
    free = toy.logits.clone().requires_grad_()
    written = toy.student.total(toy.student.logp(free)).exp()[toy.student.sequence][~is_scored].sum()  # their expected number
    (more,) = torch.autograd.grad(written, free)
    plain = float((toy.expected_gradient(advantage) * more).sum())
    charged = float((toy.expected_gradient(torch.where(is_scored, advantage, mean)) * more).sum())
    assert plain > 0 and charged < plain - 0.005


def test_the_longer_tokens_are_those_that_the_other_tokenizer_cuts_where_the_token_ends() -> None:
    toy = Toy(0)  # a, b, ab against a, b, ba
    ours, theirs = toy.student.tokens, toy.teacher.tokens
    assert longer_tokens(ours, theirs) == [[2], [], [], []]  # "a" before the "b" that the teacher writes on its own
    assert longer_tokens(theirs, ours) == [[], [2], [], []]
    assert longer_tokens(ours, ours) == [[]] * 4  # what both join says the same of both
    grouped, single = token_bytes("gpt2"), token_bytes("bundled")
    found = longer_tokens(grouped, single)
    index_of = {piece: index for index, piece in enumerate(grouped.pieces) if piece is not None}
    for beginning in (b" t", b"e", b" "):
        expected = {index for index, piece in enumerate(grouped.pieces) if piece and piece.startswith(beginning) and piece != beginning}
        assert len(expected) > 3 and set(found[index_of[beginning]]) == {index for index in expected if is_text(grouped.pieces[index])}


@pytest.mark.parametrize("seed", [0, 1])
def test_with_the_same_tokenizer_the_advantages_are_those_of_one_vocabulary(seed: int) -> None:
    toy = Toy(seed, merge="ab")
    advantage, size = toy.advantages()
    plain = toy.teacher_table[toy.teacher.prefix, toy.teacher.token] - toy.student.logp(toy.logits)
    own = [(*toy.student.tokens.encode(toy.student.text(ids)).ids, 3) == ids for ids in toy.student.complete]
    is_own = torch.tensor(own)[toy.student.sequence]
    assert 0 < sum(own) < len(own) and bool((size[is_own] == 1).all())
    assert torch.equal(advantage[is_own], plain[is_own])
    other = advantage[~is_own]
    assert bool((other == 0).any())  # spellings that are not canonical


def test_a_chunk_of_the_head_ends_where_a_span_ends_and_nothing_depends_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chunks(10, 4) == chunks(10, 4, list(range(1, 11))) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert chunks(10, 4, [1, 3, 8, 10]) == [slice(0, 3), slice(3, 8), slice(8, 10)]
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((9, 6), (11, 6), (9,)))
    span_N = torch.tensor([0, 2, 1, 0, -1, -1, 1, 0, 0])
    teacher_N, ids_N = torch.where(span_N == 0, teacher, 0.0), torch.arange(9)
    logp_N = (hidden @ weight.T).log_softmax(-1).gather(-1, ids_N[:, None])[:, 0]
    expected = torch.zeros(9, dtype=torch.float64)
    for span in (slice(0, 1), slice(1, 4), slice(6, 8), slice(8, 9)):
        expected[span] = teacher_N[span].sum() - logp_N[span].sum()
    losses = []
    for rows, piece in ((1, 100), (2, 100), (4, 100), (100, 100), (100, 1), (4, 1)):
        monkeypatch.setattr("opd.objective.head.PIECE_BYTES", 4 * 11 * piece)
        tokens = Sampled(target_N=ids_N, teacher_logp_N=teacher_N, behaviour_logp_N=logp_N, spans=ScoredSpans(span_N))
        token_loss = sampled(tokens, 1.0, Clips())
        leaf = hidden.clone().requires_grad_()
        loss, stats = chunked_loss(leaf, Head(weight, rows=rows), token_loss, ends=[1, 4, 5, 6, 8, 9])
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert torch.allclose(stats["advantage"], expected, atol=1e-12)
        assert torch.allclose(stats["reverse_kl"].sum(), -(expected[[0, 1, 6, 8]]).sum(), atol=1e-12)
        losses.append(gradient)
    assert all(torch.allclose(losses[0], other, atol=1e-12) for other in losses)


def test_the_sum_over_a_span_of_one_token_is_its_value_bitwise() -> None:
    value = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sum_over_spans(value, torch.zeros(50, dtype=torch.long))[0], value)
