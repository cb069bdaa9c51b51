"""What a run stores for its report, and the report: its content, its size, and that text of a run is never markup."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opd import errors
from opd.cli import main as cli
from opd.report import render_report
from opd.report.page import inert_json
from opd.report.tokens import spread
from opd.runs.reader import open_run
from opd.runs.text import visible
from opd.train import main

DEBUG = ("experiment=debug", "device=cpu")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stored(folder: Path) -> list[dict]:
    return [record for file in sorted((folder / "rollouts").glob("*.jsonl")) for record in lines(file)]


def test_stored_rollouts_have_the_teachers_most_likely_ids_at_each_token(debug_run):
    records = stored(debug_run)
    assert len(records) == 18
    for record in records:
        assert len(record["ids"]) == len(record["alternatives"]) == len(record["entropy"]) == record["learnt"]
        for token, logp, best in zip(record["ids"], record["teacher_logp"], record["alternatives"], strict=True):
            logps = [one["logp"] for one in best]
            assert len(best) == 5 and logps == sorted(logps, reverse=True) and sum(map(math.exp, logps)) < 1.001
            same = [one["logp"] for one in best if one["id"] == token]
            assert all(abs(value - logp) < 1e-4 for value in same)  # the token's own score, where it is among the best
            assert same or logp <= logps[-1] + 1e-4  # and no better than they are, where it is not
    assert any(entropy > 0.1 for record in records for entropy in record["entropy"])


def test_stored_tokens_flag_a_clipped_advantage(debug_run):
    metrics = {line["step"]: line for line in lines(debug_run / "metrics.jsonl")}
    for step in metrics:
        flags = [flag for record in lines(debug_run / f"rollouts/step_{step:06d}.jsonl") for flag in record["cut"]]
        assert all(isinstance(flag, bool) for flag in flags)
    for record in stored(debug_run):
        gaps = [abs(teacher - student) for teacher, student in zip(record["teacher_logp"], record["student_logp"], strict=True)]
        assert record["cut"] == [gap > 2.0 for gap in gaps]  # ppo.advantage_clip of the debug run
        assert len(record["clipped"]) == len(record["ids"])


def test_stored_tokens_flag_a_ratio_clipped_in_any_inner_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*DEBUG, "name=run", "train.max_steps=1", "optim.lr=1e-2", "optim.warmup_steps=0", "track.rollouts_per_step=8"]) == 0
    [line] = lines(tmp_path / "runs/run/metrics.jsonl")
    clipped = sum(flag for record in stored(tmp_path / "runs/run") for flag in record["clipped"])
    assert clipped == round(2 * line["clipped"] * line["tokens"]) > 0  # only in the second inner step: in the first every ratio is 1


def test_storing_rollouts_does_not_change_training(debug_run, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    assert main([*DEBUG, "name=run", "track.rollouts_per_step=0"]) == 0
    folder = tmp_path / "runs" / "run"
    assert not stored(folder)
    one, other = (AutoModelForCausalLM.from_pretrained(path / "final").state_dict() for path in (debug_run, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_stored_rollouts_tell_how_many_tokens_were_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["train.max_steps=1", "sampling.max_new_tokens=2", "track.rollouts_per_step=8"]
    for name, options in {"mask": ["sampling.truncated=mask"], "prefix": ["ppo.loss_prefix=1"]}.items():
        assert main([*DEBUG, f"name={name}", *short, *options]) == 0
    masked, prefix = stored(tmp_path / "runs" / "mask"), stored(tmp_path / "runs" / "prefix")
    cut_off = [record for record in masked if record["finish_reason"] == "length"]
    assert cut_off and all(record["learnt"] == 0 and record["teacher_logp"][0] is not None for record in cut_off)
    assert all(record["learnt"] == 1 for record in prefix) and all(record["alternatives"][1:] == [None] for record in prefix)


def test_metrics_by_position_sum_to_the_metrics_of_the_step(debug_run):
    for line in lines(debug_run / "metrics.jsonl"):
        by_position = line["by_position"]
        assert by_position["width"] == 1 and len(by_position["tokens"]) == 8 and sum(by_position["tokens"]) == line["tokens"]
        assert sum(by_position["ends"]) == line["finish/stop"] + line["finish/length"]
        assert by_position["ends"][-1] >= line["finish/length"]
        for name in ("reverse_kl", "entropy"):
            total = sum(value * count for value, count in zip(by_position[name], by_position["tokens"], strict=True) if count)
            assert math.isclose(total / line["tokens"], line[name], rel_tol=1e-5)


def test_growth_of_peak_memory_sums_to_at_most_the_peak(debug_run):
    summary = json.loads((debug_run / "summary.json").read_text())
    grown = summary["peak_memory_grown_bytes"]
    assert set(grown) == {"loading", "evaluation", "sampling", "scoring", "update"} and min(grown.values()) >= 0 < grown["loading"]
    assert sum(grown.values()) <= summary["peak_memory_bytes"]


def read(folder: Path, **files: str) -> str:
    """Return the report of a run folder with these files."""
    folder.mkdir(parents=True)
    for name, content in {"status.json": '{"status": "running"}', **files}.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    return render_report([open_run(folder)])


def test_a_finished_run_has_a_self_contained_report(debug_run):
    html = (debug_run / "report.html").read_text(encoding="utf-8")
    summary = json.loads((debug_run / "summary.json").read_text())
    assert f"{summary['reward_after']:.1%}" in html and f"{summary['gap_closed']:.1%}" in html
    assert f"torch {torch.__version__}" in html and "experiment=debug" in html and "is not finished" not in html
    assert not re.search(r'(?:src|href|url\(|@import|xlink)\s*=?["\'(]?\s*(?:https?:)?//', html)


def test_a_report_that_fails_does_not_fail_the_run(tmp_path, monkeypatch, capfd):
    from opd.training import finish

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finish, "render_report", lambda runs: 1 / 0)
    assert main([*DEBUG, "name=run", "train.max_steps=1"]) == 0
    folder = tmp_path / "runs" / "run"
    assert json.loads((folder / "status.json").read_text())["status"] == "done" and not (folder / "report.html").exists()
    assert "report.html could not be saved" in capfd.readouterr().out + (folder / "train.log").read_text()


def test_report_of_a_run_that_is_new_or_half_way(tmp_path):
    assert "Nothing was evaluated yet" in read(tmp_path / "new")
    half = read(
        tmp_path / "half",
        **{
            "metrics.jsonl": '{"step": 1, "tokens": 3, "reverse_kl": null}\n{"step": 2, "tok',
            "evaluations.jsonl": '{"model": "student", "step": 0, "rewards": null, "kl": 1.25}\n',
            "rollouts__step_000001.jsonl": "",
        },
    )
    assert "1.25" in half and "is not finished" in half and "No completions are stored" in half


def test_report_of_damaged_logs_is_a_data_error_that_names_the_run(tmp_path):
    for name in ("metrics.jsonl", "evaluations.jsonl", "rollouts__step_000001.jsonl"):
        with pytest.raises(errors.DataError, match=r"damaged.*cannot be read"):
            read(tmp_path / name / "damaged", **{name: '{"step": \n'})


@pytest.mark.parametrize("bad", ["NaN", "-Infinity", "null"])
def test_report_of_a_run_with_numbers_that_are_not_finite(tmp_path, bad):
    best = f'[{{"id": 5, "text": "a", "logp": -0.5}}, {{"id": 6, "text": "b", "logp": {bad}}}]'
    record = (
        f'{{"tokens": ["a", "b", "c"], "ids": [5, 6, 7], "student_logp": [{bad}, -1.0, {bad}], "teacher_logp": [-2.0, {bad}, -3.0], '
        f'"entropy": [{bad}, 1.0, 1.0], "alternatives": [{best}, null, null], "span": SPAN}}\n'
    )
    kl = ['"kl": 1.5, "kl_interval": [1.0, 2.0]', f'"kl": null, "kl_interval": {"null" if bad == "null" else f"[{bad}, {bad}]"}']
    files = {
        "rollouts__step_000001.jsonl": record.replace("SPAN", "null") + record.replace("SPAN", "[0, 1, 0]"),
        "evaluations.jsonl": "".join(f'{{"model": "student", "step": {step}, {each}}}\n' for step, each in enumerate(kl)),
    }
    page = read(tmp_path / "run", **files)
    (run,) = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    plain, spans = (rollout["tokens"] for rollout in run["rollouts"])
    assert [token[2:5] for token in plain] == [[None, -2.0, None], [-1.0, None, 1.0], [None, -3.0, 1.0]]
    assert plain[0][6] == [["a", -0.5, True]], "without the one that has no number"
    assert [token[2:4] for token in spans] == [[None, -2.0], [None, -3.0], [None, -3.0]] and "nan" not in page


@pytest.mark.parametrize("letter", [*"<>&\u2028\u2029"])
def test_embedded_json_has_no_character_of_markup(letter):
    text = f"a{letter}/script{letter}"
    assert letter not in inert_json({"x": text}) and json.loads(inert_json({"x": text})) == {"x": text}


def test_every_text_of_a_run_is_escaped(tmp_path):
    bad = "<b id=bad>\u202e"
    html = read(
        tmp_path / bad,
        **{
            "run.json": json.dumps({"config": {"model": {"path": bad}, bad: bad}}),
            "status.json": json.dumps({"status": "failed", "reason": bad}),
            ".hydra__overrides.yaml": json.dumps([bad]),
        },
    )
    assert "<b id=bad>" not in html and "\u202e" not in html and html.count("&lt;b id=bad&gt;⟨U+202E⟩") >= 6


def test_invisible_characters_become_visible_marks():
    assert visible("a\x00b\u202ec\ud800d\u200be\nf\tg", 99) == "a␀b⟨U+202E⟩c⟨U+D800⟩d⟨U+200B⟩e↵\nf⇥g"
    assert visible("é漢🙂 x", 99) == "é漢🙂 x"
    assert visible("x" * 100, 10) == "x" * 10 + " … (+90 characters)"


def test_report_of_a_long_run_is_bounded_in_size_and_says_what_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("opd.report.tokens.MAX_BYTES", 60_000)
    record = {"tokens": ["wörd"] * 2_000, "ids": [1] * 2_000, "student_logp": [-1.0] * 2_000, "teacher_logp": [-2.0] * 2_000}
    files = {f"rollouts__step_{step:06d}.jsonl": json.dumps(record) + "\n" for step in range(1, 41)}
    html = read(tmp_path / "long", **files)
    assert len(html.encode()) < 120_000
    assert "1 of 40 stored steps" in html and "cut to their first 1,500 tokens" in html


def test_steps_of_the_token_view_are_spread_over_the_run():
    assert spread(range(1, 10))[:3] == [1, 9, 5] and sorted(spread(range(100))) == [*range(100)]
    assert spread([]) == [] and spread([4]) == [4]


def test_report_writes_one_file_without_importing_torch(debug_run, tmp_path, capfd):
    out = tmp_path / "both.html"
    words = ["report", str(debug_run), str(debug_run.parent), "--out", str(out)]
    code = f"import sys; from opd.cli.main import main; assert main({words}) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"{out}\n", done.stderr
    assert "<h1><bdi>run</bdi></h1>" in out.read_text(encoding="utf-8")  # named twice, it is one run
    assert cli.main(words) == 0
    assert capfd.readouterr().out == f"{out} (replaced)\n"
    out.write_text("mine")
    assert cli.main(words) == errors.OUTPUT and out.read_text() == "mine"


def test_report_mistakes_are_one_line_with_an_exit_code(debug_run, tmp_path, capfd):
    mistakes = {("nowhere",): 65, (str(debug_run), "--out", str(tmp_path)): 74, (): 64, (str(debug_run), "--out", "no/x.html"): 74}
    for words, code in mistakes.items():
        assert cli.main(["report", *words]) == code
        message = capfd.readouterr().err
        assert message.startswith("opd: error: ") and len(message.splitlines()) == 1
