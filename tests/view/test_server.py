"""What the server gives away: the named runs, to this machine, to read."""

import http.client
import json
import re
import threading
from pathlib import Path

import pytest

import grpo.view
from grpo.view.command import main
from grpo.view.page_files import PARTS, SCRIPTS, part
from grpo.view.server import Logs, Server
from tests.support.many_completions import write_run
from tests.view.test_logs_of_unknown_origin import columns_of

PAGE = Path(grpo.view.__file__).parent / "page"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    write_run(root / "runs" / "one", 128, 100)
    (root / "runs" / "one" / "secret.txt").write_text("secret")
    (root / "secret.txt").write_text("secret")
    logs = Logs([root / "runs"])
    logs.refresh()
    server = Server(logs, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server: Server, path: str, method: str = "GET", host: str | None = "127.0.0.1"):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.putrequest(method, path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, dict(answer.headers), answer.read()


def test_it_listens_on_the_loopback_interface_only(server):
    assert server.server_address[0] == "127.0.0.1" and server.url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    "host", [None, "", "evil.example", "evil.example:6007", "127.0.0.1.evil.example", "[::2]:80", "localhost.evil"]
)
def test_a_foreign_name_is_refused(server, host):
    """DNS rebinding: a page of another host reaches this port under its own name. The control is the next test."""
    status, _, content = ask(server, "/api/runs", host=host)
    assert status == 403 and b"reward" not in content


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:6007", "localhost:8888", "[::1]:6007"])
def test_this_machine_is_answered(server, host):
    status, headers, content = ask(server, "/api/runs", host=host)
    assert status == 200 and [run["name"] for run in json.loads(content)["runs"]] == ["one"]
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff" and "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/page/../server.py",
        "/page/..%2fserver.py",
        "/page/%2e%2e/server.py",
        "/page//etc/passwd",
        "/runs/one/secret.txt",
        "/api/texts?run=../one&rows=0",
        "/api/rows?run=one&first=0&generation=0",
        "/api/metrics?run=-1",
        "/api/metrics?run=1",
        "/api/metrics?run=%00",
        "/api/metrics?run=0_0",
        "/api/metrics?run=%D9%A0",  # a digit of another script
        "/api/texts?run=0&rows=128",
        "/api/texts?run=0&rows=" + ",".join(["0"] * 501),
        "/api/search?run=0&text=",
        "/api/search?run=0&text=" + "x" * 2000,
        "/api/metrics?" + "&".join(f"a{i}=1" for i in range(100)),
        "//secret.txt",
        "http://127.0.0.1/etc/passwd",
        "/api/",
        "/api/nothing?run=0",
    ],
)
def test_nothing_else_can_be_asked_for(server, path):
    status, _, content = ask(server, path)
    assert status in (400, 404) and b"secret" not in content and b"root:" not in content, (status, content[:200])
    assert ask(server, "/")[0] == 200, "and the server goes on"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"])
def test_nothing_can_be_changed(server, method):
    assert ask(server, "/api/runs", method)[0] == 501


def test_every_question_has_its_answer(server):
    header, columns = columns_of(ask(server, "/api/rows?run=0&first=0&generation=0")[2])
    assert header["count"] == 128 and sorted(set(columns["step"].tolist())) == [1, 2]
    [text] = json.loads(ask(server, "/api/texts?run=0&rows=5&whole=1")[2])
    assert text["question"].startswith("Question") and "####" in text["completion"]
    found = json.loads(ask(server, "/api/search?run=0&text=" + "QUESTION%2015")[2])
    assert found and {columns["question"][row] for row in found} == {columns["question"][found[0]]}
    curves = json.loads(ask(server, "/api/metrics?run=0")[2])["curves"]
    assert curves["reward/mean"][0] == [1, 2]
    assert json.loads(ask(server, "/api/token_rows?run=0")[2]) == []
    assert json.loads(ask(server, "/api/tokens?run=0&step=1&row=0")[2]) is None
    status, headers, content = ask(server, "/api/export?runs=0")
    assert status == 200 and "attachment" in headers["Content-Disposition"] and content.startswith(b"<!doctype html>")


def test_the_page_parses_no_markup_and_fetches_nothing():
    """The ways from a string to markup or code, and addresses, in any file of the page."""
    ways = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|\beval\("
        r"|new Function|srcdoc|setAttribute\(\"on|javascript:|https?://(?!www\.w3\.org/2000/svg)|//cdn|@import|url\("
    )
    for path in PAGE.iterdir():
        assert not ways.search(path.read_text(encoding="utf-8")), path.name
    assert {path.name for path in PAGE.iterdir()} == PARTS | {"index.html"}
    assert all(part(name).startswith(b'"use strict";') for name in SCRIPTS)


def test_the_package_ships_the_page():
    """A wheel without the page would start and show nothing."""
    project = (Path(grpo.view.__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^\[tool\.setuptools\.package-data\]\n"grpo\.view" = \["page/\*"\]$', project, re.M)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["/nowhere"], "error: runs: /nowhere is no folder"),
        (["--port", "70000"], "error: port: 70000, allowed: 0 to 65535."),
        (["--port", "x"], "error: argument --port: invalid int value: 'x'"),
        (["--limit_mb", "0"], "error: limit_mb: 0, allowed: 1 to 150 (browsers open no more)."),
        (["--limit_mb", "nan"], "error: limit_mb: nan, allowed: 1 to 150 (browsers open no more)."),
        (["--what"], "error: unrecognized arguments: --what"),
    ],
)
def test_wrong_commands_end_in_one_line(argv, line, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1, err


def test_a_port_in_use_and_a_file_that_cannot_be_written(server, tmp_path, capsys):
    runs = str(server.logs.roots[0])
    assert main([runs, "--port", str(server.server_address[1])]) == 2
    assert main([runs, "--export", str(tmp_path / "none" / "report.html")]) == 2
    assert [line.split(":")[1] for line in capsys.readouterr().err.splitlines()] == [" port", " export"]
