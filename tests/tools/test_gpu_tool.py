"""tools/gpu.py: parts in processes of their own, time limits, going on, what is said of what is missing."""

from __future__ import annotations

import json
import runpy
import sys

import pytest

from tools import gpu

ENTRY = {
    "milliseconds": {"median": 10.0, "q1": 9.0, "q3": 11.0, "num": 3},
    "tflops": 450.0,
    "mfu": 0.455,
    "mfu_cap": 0.803,
    "bytes": 2e9,
}


def result(**medians):
    times = {
        name.replace("__", "."): {
            **ENTRY,
            "milliseconds": {"median": m, "q1": 0.9 * m, "q3": 1.1 * m, "num": 3},
        }
        for name, m in medians.items()
    }
    return {
        "times": times,
        "versions": {"jax": "0.11.2", "python": "3.12.3"},
        "hardware": {"graphics": ["NVIDIA H200, 580.1, 143771 MiB"], "devices": ["NVIDIA H200"]},
        "shapes": {
            "name": "sd35m",
            "num": 9,
            "side": 64,
            "tokens": 205,
            "parameters": 2.24e9,
            "dtype": "bfloat16",
        },
    }


def script(monkeypatch, text):
    """Every part runs this Python text, which finds its record's path in `sys.argv[1]`."""
    monkeypatch.setattr(
        gpu,
        "command",
        lambda part, options, seconds, record: [sys.executable, "-c", text, str(record)],
    )


def test_a_part_leaves_a_record_and_is_not_run_again(monkeypatch, tmp_path, capsys):
    script(
        monkeypatch,
        f"import sys; open(sys.argv[1], 'w').write({json.dumps(json.dumps(result(weighted_sum=8.0)))})",
    )
    out = tmp_path / "new"
    arguments = [f"--out={out}", "--parts=core", "--force"]
    assert gpu.main(arguments) == 0
    assert (
        "| weighted_sum | 8.00 (7.20 to 8.80) | 450 | 46% | 80% | 2.0 |" in capsys.readouterr().out
    )
    assert sorted(p.name for p in out.iterdir()) == ["gpu.json", "log.txt"]
    script(monkeypatch, "raise SystemExit('must not run')")
    assert gpu.main(arguments) == 0 and gpu.main([*arguments, "--show"]) == 0
    assert gpu.main([*arguments, "--again"]) == 1
    assert "core: failed: must not run" in capsys.readouterr().out
    # A failure leaves the older record alone.
    assert json.loads((out / "gpu.json").read_text())["parts"]["core"]["state"] == "done"


def test_a_part_that_takes_too_long_is_ended_and_the_next_one_is_not_begun(
    monkeypatch, tmp_path, capsys
):
    script(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(gpu, "FEWEST_SECONDS", {"core": 0.4})
    monkeypatch.setattr(gpu, "MARGIN", 0)
    assert (
        gpu.main(
            [f"--out={tmp_path}", "--parts=core,more", "--seconds=0.5", "--total=0.6", "--force"]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "core: stopped: not finished within 0 s" in said and "more: stopped: no time left" in said
    )
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {part["state"] for part in parts.values()} == {"stopped"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "log.txt"]


def test_it_ends_before_its_time_and_begins_what_can_end(monkeypatch, tmp_path, capsys):
    """Ten minutes: the margin off, a part of four minutes each; the one that needs four is not begun in the third."""
    now = iter([0.0, 0.0, 240.0, 480.0, 520.0])
    limits = {}

    def run_part(part, options, seconds):
        limits[part] = seconds
        return {"state": "done", "result": result(**{f"{part}_row": 1.0})}

    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(gpu, "monotonic", lambda: next(now))
    arguments = [f"--out={tmp_path}", "--parts=core,dots,unrolled,more", "--total=600", "--force"]
    assert gpu.main(arguments) == 0
    assert limits == {"core": 420.0, "dots": 340.0, "more": 60.0}
    assert "unrolled: stopped: no time left" in capsys.readouterr().out
    # The next call has the one that is left to do.
    limits.clear()
    monkeypatch.setattr(gpu, "monotonic", lambda: 0.0)
    assert gpu.main(arguments) == 0 and list(limits) == ["unrolled"]


def test_rows_of_a_setting_have_its_name(tmp_path):
    parts = {
        "core": {"state": "done", "result": result(exact_k5=10.0)},
        "dots": {"state": "done", "result": result(exact_k5=8.0)},
    }
    record = gpu.combine(parts)
    assert set(record["times"]) == {"exact_k5", "exact_k5.dots"}
    assert record["ratios"]["exact_k5.dots / exact_k5"]["median"] == pytest.approx(1.25)
    options = gpu.parse([f"--out={tmp_path}"])
    assert "--remat=dots" in gpu.command("dots", options, 100.0, tmp_path / "record")
    assert "--unroll=13" in gpu.command("unrolled", options, 100.0, tmp_path / "record")


def test_what_the_presets_run_is_begun_within_a_lent_machines_time(tmp_path):
    """The first four parts, each with the least that it is begun with, in nine minutes less the margin."""
    first = gpu.PARTS[:4]
    assert first == ("core", "unrolled", "tuned", "tests")
    assert sum(gpu.FEWEST_SECONDS.get(part, gpu.FEWEST) for part in first) <= 540 - gpu.MARGIN
    # The presets for large cards have what the second part is about.
    presets = runpy.run_path(str(gpu.ROOT / "configs" / "sd3.py"))["get_config"]
    for name in ("gpu_80gb", "gpu_140gb", "gpu_8x80gb"):
        model = presets(name).model
        assert (model.remat, f"--unroll={model.unroll}") == ("none", *gpu.VARIANTS["unrolled"])


def test_a_part_needs_what_the_package_does():
    for part in gpu.PARTS:
        assert {"jax", "jaxtyping", "orbax-checkpoint", "etils", "annotated-types"} <= set(
            gpu.NEEDS[part]
        )
    assert "torch" in gpu.NEEDS["tuned"] and "torch" not in gpu.NEEDS["unrolled"]
    assert "pytest" in gpu.NEEDS["tests"] and "pytest" not in gpu.NEEDS["core"]
    assert gpu.distributions(["a.b-c[d,e]>=1", "f_g", "h ; python_version<'4'"]) == (
        "a.b-c",
        "f_g",
        "h",
    )
    # The distribution's name is not the module's: orbax-checkpoint brings orbax, and yaml is no distribution.
    assert gpu.not_installed(["orbax-checkpoint", "ml-collections", "yaml"]) == ["yaml"]


def test_a_part_without_its_packages_is_skipped_with_the_reason(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(gpu.NEEDS, "upstream", ("jax", "no_such_package"))
    assert gpu.main([f"--out={tmp_path}", "--parts=upstream", "--force"]) == 0
    assert "upstream: skipped: not installed: no_such_package" in capsys.readouterr().out


def test_tests_are_counted(monkeypatch, tmp_path, capsys):
    report = (
        '<testsuites><testsuite><testcase name="a" time="1.5"/><testcase name="b"><failure message="off"/>'
        '</testcase><testcase name="c"><skipped message="no GPU"/></testcase></testsuite></testsuites>'
    )
    script(
        monkeypatch, f"import sys; open(sys.argv[1], 'w').write({report!r}); raise SystemExit(1)"
    )
    assert gpu.main([f"--out={tmp_path}", "--parts=tests", "--force"]) == 1
    said = capsys.readouterr().out
    assert (
        "tests: 1 passed, 1 failed, 1 skipped" in said
        and "failed: b: off" in said
        and "skipped: c: no GPU" in said
    )


def test_ratios_between_parts_by_hand():
    parts = {
        "core": {"state": "done", "result": result(exact_k5=10.0)},
        "upstream": {"state": "done", "result": result(torch__upstream__harmonised=30.0)},
        "tuned": {"state": "failed", "reason": "out of memory"},
    }
    record = gpu.combine(parts)
    found = record["ratios"]["exact_k5 / torch.upstream.harmonised"]
    assert found == pytest.approx({"median": 3.0, "low": 27 / 11, "high": 33 / 9})
    text = gpu.table(record)
    assert "| exact_k5 / torch.upstream.harmonised | 3.00 | 2.45 | 3.67 |" in text
    assert "NVIDIA H200, 580.1, 143771 MiB" in text and "tuned: failed: out of memory" in text


def test_commands_and_their_limits(tmp_path):
    options = gpu.parse([f"--out={tmp_path}", "--rounds=7"])
    core = gpu.command("core", options, 100.0, tmp_path / "record")
    assert {
        "--no-torch",
        "--size=sd35m",
        "--seconds=40",
        "--repeats=7",
        "--torch-compile=off",
    } <= set(core)
    assert "--torch-compile=on" in gpu.command("compiled", options, 100.0, tmp_path / "record")
    tests = gpu.command("tests", options, 100.0, tmp_path / "record")
    assert tests[1:6] == ["-m", "pytest", "-q", "-m", "gpu"] and all(
        (gpu.ROOT / f).is_file() for f in tests[8:]
    )
    assert len(tests) > 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts=core,speed"], "--parts: expected some of core, unrolled,"),
        (["--rounds=0"], "--rounds: expected a number"),
        (["--total=-1"], "--total: expected a number above 0; received -1.0"),
    ],
)
def test_bad_flags(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main([f"--out={tmp_path}", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("left", ['{"parts": {"co', "", "[1]", '{"parts": {"core": {}}}', b"\xff"])
def test_a_record_that_was_cut_is_one_line_and_stays(left, tmp_path, capsys):
    left = left if isinstance(left, bytes) else left.encode()
    (tmp_path / "gpu.json").write_bytes(left)
    assert gpu.main([f"--out={tmp_path}", "--force"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("tools.gpu: --out: expected the record of")
    assert (tmp_path / "gpu.json").read_bytes() == left


def test_a_machine_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    out = tmp_path / "nothing"
    assert gpu.main([f"--out={out}"]) == 2 and not out.exists()
    assert capsys.readouterr().err.startswith(
        "tools.gpu: expected a machine with an NVIDIA GPU; received one"
    )


def test_a_dry_run_of_one_row(tmp_path, capsys):
    """The whole way in processes of its own, as on a GPU, with the smallest row."""
    arguments = ["--size=tiny", "--force", "--parts=core", "--rows=weighted_sum", "--rounds=1"]
    assert gpu.main([f"--out={tmp_path}", *arguments]) == 0, (tmp_path / "log.txt").read_text()
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert set(record["times"]) == {"weighted_sum"} and record["shapes"]["name"] == "tiny"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "log.txt"]
    assert "| weighted_sum |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_way_at_a_tiny_size(tmp_path):
    """What a GPU machine runs, in its own processes, with sizes for a CPU."""
    for name in ("torch", "diffusers", "peft"):
        pytest.importorskip(name)
    assert (
        gpu.main(
            [f"--out={tmp_path}", "--size=tiny", "--force", "--parts=core,upstream", "--rounds=3"]
        )
        == 0
    )
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert {"exact_k5", "exact_k5.step", "torch.upstream.harmonised"} <= set(record["times"])
    assert record["ratios"]["exact_k5 / torch.upstream.harmonised"]["median"] > 0
    assert all(entry.get("flops", 1) > 0 for entry in record["times"].values())
