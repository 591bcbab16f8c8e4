"""`solo chat`: conversations, at a terminal and piped."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest

from solo_vlm.data.sample import parse_sample
from solo_vlm.generate import GenerationPipeline, PrefixCache
from solo_vlm.generate.conversation import Conversation
from solo_vlm.utils.errors import SoloError

SOLO = Path(sys.executable).with_name("solo")


@pytest.fixture
def conversation(solo_folder):
    return Conversation(GenerationPipeline.from_pretrained(solo_folder, prefix_cache=PrefixCache()))


def ask(conversation, question: str) -> dict:
    return conversation.ask(question, lambda text: None, max_new_tokens=4)


def test_images_belong_to_the_next_question_only(conversation, tmp_path, picture):
    picture(64, 64).save(tmp_path / "a.png")
    conversation.add_images([str(tmp_path / "a.png")] * 2)
    first = ask(conversation, "what is this?")
    second = ask(conversation, "and now?")
    assert (first.num_patches, second.num_patches) == (8, 8)
    assert second.cached_tokens >= first.prompt_tokens - 1
    assert len(conversation.turns) == 4


def test_failure_leaves_conversation_unchanged(conversation, tmp_path, picture):
    picture(64, 64).save(tmp_path / "a.png")
    conversation.add_images([str(tmp_path / "a.png")])
    with pytest.raises(SoloError, match=r"missing\.png"):
        conversation.add_images([str(tmp_path / "a.png"), str(tmp_path / "missing.png")])
    with pytest.raises(SoloError, match="context"):
        ask(conversation, "hello " * 1000)
    with pytest.raises(SoloError, match="cannot read"):
        conversation.load(tmp_path / "none.json")
    assert conversation.turns == []
    assert ask(conversation, "what is this?").num_patches == 4  # the image was still pending


def test_saved_conversation_resumes(conversation, solo_folder, tmp_path, picture):
    picture(64, 64).save(tmp_path / "a.png")
    conversation.add_images([str(tmp_path / "a.png")])
    ask(conversation, "what is this?")
    conversation.save(tmp_path / "new" / "chat.json")
    other = Conversation(GenerationPipeline.from_pretrained(solo_folder))
    other.load(tmp_path / "new" / "chat.json")
    assert ask(other, "and now?").text == ask(conversation, "and now?").text
    other.reset()
    assert ask(other, "and now?").num_patches == 0
    for text in ("", "{", "[]", '{"messages": []}', '{"messages": [{"role": "user", "content": 3}]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(SoloError, match="is not a conversation"):
            other.load(tmp_path / "bad.json")
    with pytest.raises(SoloError, match=r"cannot access .*a\.png: File exists"):
        other.save(tmp_path / "a.png" / "chat.json")


def test_commands_and_messages_from_a_pipe(run, monkeypatch, solo_folder, tmp_path, picture):
    spaced = tmp_path / "a b's.png"
    picture(64, 64).save(spaced)
    lines = [
        "/image",
        f"/image {spaced}",
        f'/image "{spaced}"',
        "/image 'unbalanced",
        "/image http://127.0.0.1:9/none.png",
        "what is [/bold] this?",
        "/nonsense",
        "/save",
        f"/save {tmp_path}/chat.json",
        "/reset",
        f"/load {tmp_path}/chat.json",
    ]  # no /quit: the end of input quits
    monkeypatch.setattr(sys, "stdin", StringIO("\n".join(lines) + "\n"))
    code, out, error = run("chat", "--model", solo_folder, "--max-new-tokens", 4)
    assert code == 0
    for message in (
        "/image needs a path",
        "no closing quotation",
        "none.png",
        "/save needs a file",
        "saved to",
        "2 turns",
    ):
        assert message in out
    assert "Traceback" not in out + error
    sample = parse_sample(json.loads((tmp_path / "chat.json").read_text()))
    assert sample.images == [str(spaced)] * 2
    assert sample.messages[0]["content"][-1]["text"] == "what is [/bold] this?"


def test_invalid_utf8_is_rejected_without_losing_the_conversation(solo_folder, tmp_path, picture):
    odd = str(tmp_path / "caf\udce9.png")
    picture(64, 64).save(odd)
    lines = [
        b"what is this?",
        b"/image " + os.fsencode(odd),
        b"caf\xe9",
        b"and this?",
        b"/load " + b"[" * 10,
        f"/save {tmp_path}/chat\0.json".encode(),
        f"/save {tmp_path}/chat.json".encode(),
        f"/load {tmp_path}/chat.json".encode(),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "solo_vlm", "chat", "--model", str(solo_folder), "--max-new-tokens", "4"],
        input=b"\n".join(lines) + b"\n",
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    out = done.stdout.decode()
    assert out.count("the prompt cannot be used: character 3") == 1
    assert "4 turns" in out
    sample = parse_sample(json.loads((tmp_path / "chat.json").read_bytes()))
    assert sample.images == [odd]
    assert [m["content"][-1]["text"] for m in sample.messages[::2]] == ["what is this?", "and this?"]


def test_saved_conversation_finds_its_images_from_any_folder(
    conversation, solo_folder, tmp_path, picture, monkeypatch
):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    picture(64, 64).save(tmp_path / "here" / "a.png")
    monkeypatch.chdir(tmp_path / "here")
    conversation.add_images(["a.png"])
    ask(conversation, "what is this?")
    conversation.save(tmp_path / "there" / "chat.json")
    monkeypatch.chdir(tmp_path)
    other = Conversation(GenerationPipeline.from_pretrained(solo_folder))
    other.load(tmp_path / "there" / "chat.json")
    assert other.turns[0]["content"][0]["path"] == str(tmp_path / "here" / "a.png")
    saved = json.loads((tmp_path / "there" / "chat.json").read_text())
    saved["messages"][0]["content"][0]["path"] = "../here/a.png"
    (tmp_path / "there" / "chat.json").write_text(json.dumps(saved))
    other.load(tmp_path / "there" / "chat.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(SoloError, match="too deeply nested"):
        other.load(tmp_path / "deep.json")


def test_ctrl_c_stops_the_answer_but_not_the_program(solo_folder):
    with Terminal(SOLO, "chat", "--model", solo_folder, "--max-new-tokens", "400") as terminal:
        terminal.wait_for("you:")
        terminal.type("hello\n")
        terminal.wait_for("solo: ")
        terminal.press_ctrl_c()
        terminal.wait_for("(stopped)")
        terminal.wait_for("you:")
        # Just before input() waits for keys, Python notices a signal only with the next key.
        for _ in range(10):
            terminal.press_ctrl_c()
            if terminal.says("/quit or press", within=2):
                break
        else:
            pytest.fail(f"Ctrl-C at the prompt does nothing: {terminal.seen!r}")
        terminal.wait_for("you:")
        terminal.type("/quit\n")
        assert terminal.ended() == 0
    assert "Traceback" not in terminal.seen


class Terminal:
    """Program that runs in a pseudo-terminal."""

    def __init__(self, *command) -> None:
        self.seen = ""
        self._place = 0
        self._pid, self._keyboard = pty.fork()
        if self._pid == 0:
            # A background job inherits SIGINT as ignored.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            plain = {**os.environ, "TERM": "dumb"}  # no color codes between the words
            os.execve(command[0], [str(word) for word in command], plain)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_) -> None:
        os.close(self._keyboard)

    def type(self, text: str) -> None:
        os.write(self._keyboard, text.encode())

    def press_ctrl_c(self) -> None:
        self.type("\x03")

    def wait_for(self, text: str) -> None:
        """Read until the program prints the text."""
        if not self.says(text, within=60):
            raise TimeoutError(f"no {text!r} in {self.seen!r}")

    def says(self, text: str, within: float) -> bool:
        """Return whether the program prints the text before it is silent for this many seconds."""
        while (at := self.seen.find(text, self._place)) < 0:
            if not select.select([self._keyboard], [], [], within)[0]:
                return False
            self.seen += os.read(self._keyboard, 4096).decode(errors="replace")
        self._place = at + len(text)
        return True

    def ended(self, seconds: float = 60) -> int:
        """Return the exit code."""
        for _ in range(int(10 * seconds)):
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.1)
        os.kill(self._pid, signal.SIGKILL)
        raise TimeoutError
