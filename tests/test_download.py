"""download.sh against a server on this machine: what it asks for, what it leaves on the disk, what it says."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "download.sh"
QUERY = "Policy=eyJ%2Fa%3D%3D&Signature=x~y-z__&Key-Pair-Id=K"
SHARD = bytes(range(256)) * 40
HALF = len(SHARD) // 2
PAGE = b"\n  <!doctype HTML>\n<html><body>Log in to continue</body></html>\n"

MODELS = {
    **dict.fromkeys(("7b", "7b-Python", "7b-Instruct"), 1),
    **dict.fromkeys(("13b", "13b-Python", "13b-Instruct"), 2),
    **dict.fromkeys(("34b", "34b-Python", "34b-Instruct"), 4),
    **dict.fromkeys(("70b", "70b-Python", "70b-Instruct"), 8),
}


def model_files(model: str) -> dict[str, bytes]:
    """Return the files of a model in miniature, under their paths at the server, with a right checklist."""
    files = {"params.json": b'{"dim": 8}\n', "tokenizer.model": b"\n\x0e\n\x05<unk>"}
    for shard in range(MODELS[model]):
        files[f"consolidated.{shard:02d}.pth"] = SHARD + f"{model} {shard}".encode()
    lines = [f"{hashlib.md5(content).hexdigest()}  {name}\n" for name, content in files.items()]
    files["checklist.chk"] = "".join(lines).encode()
    return {f"CodeLlama-{model}/{name}": content for name, content in files.items()}


LOCAL = {"CodeLlama-LICENSE": "LICENSE", "CodeLlama-USE_POLICY.md": "USE_POLICY.md"}


@dataclass
class Mirror:
    """What the server holds, how it misbehaves, and what was asked of it. Paths are relative to the URL's star."""

    files: dict[str, bytes] = field(default_factory=lambda: {"LICENSE": b"licence\n", "USE_POLICY.md": b"# Policy\n"})
    statuses: dict[str, list[int]] = field(default_factory=dict)  # answered before the file itself
    forbidden: set[str] = field(default_factory=set)
    drop_after: dict[str, int] = field(default_factory=dict)  # the first answer to a path ends after so many bytes
    ranges: bool = True
    stuck: str = ""  # this path's answer stops half-way, until it is asked for again
    half_sent: threading.Event = field(default_factory=threading.Event)
    asked_again: threading.Event = field(default_factory=threading.Event)
    content_type: str = "binary/octet-stream"
    requests: list[tuple[str, str, int | None]] = field(default_factory=list)  # path, query, start of the range
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/release/*?{QUERY}"

    def starts(self, path: str) -> list[int | None]:
        """Return the range start of every request for a path; None stands for the whole file."""
        return [start for asked, _, start in self.requests if asked == path]


def handler_for(mirror: Mirror) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            path = path.removeprefix("/release/")
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(match[1]) if match else None
            mirror.requests.append((path, query, start))
            if mirror.statuses.get(path):
                self.answer(mirror.statuses[path].pop(0))
            elif path in mirror.forbidden:
                self.answer(403, b"<Error>Access denied</Error>")
            elif path not in mirror.files:
                self.answer(404)
            elif start is not None and mirror.ranges and start >= len(mirror.files[path]):
                self.answer(416, headers={"Content-Range": f"bytes */{len(mirror.files[path])}"})
            else:
                self.send_file(path, start if mirror.ranges else None)

        def send_file(self, path: str, start: int | None) -> None:
            whole = mirror.files[path]
            body = whole[start or 0 :]
            self.send_response(200 if start is None else 206)
            if start is not None:
                self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
            self.send_header("Content-Type", mirror.content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if path == mirror.stuck and not mirror.half_sent.is_set():
                self.wfile.write(body[:HALF])
                mirror.half_sent.set()
                mirror.asked_again.wait(20)
            elif path == mirror.stuck:
                mirror.asked_again.set()
                self.wfile.write(body)
            else:
                self.wfile.write(body[: mirror.drop_after.pop(path, len(body))])
            self.close_connection = True

    return Handler


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    mirror = Mirror()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler_for(mirror)) as server:
        mirror.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield mirror
        server.shutdown()
        thread.join()


@pytest.fixture(params=["wget", "curl"])
def downloader(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not on the PATH")
    return name


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "weights of today"


def run(target: Path, *arguments: str, stdin: str = "", returncode: int = 0, **environment: str) -> str:
    """Run download.sh and return all that it printed, after checking its status and that it kept the URL to itself."""
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        input=stdin,
        env=environment_for(target) | environment,
        cwd=target.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == returncode, done.stdout
    assert "Signature" not in done.stdout
    return done.stdout


def environment_for(target: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(target.parent), "TARGET": str(target), "RETRY_DELAY": "0"}


def contents(target: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    # Meta's licence and policy get a name of their own: the folder may hold this repository's LICENSE.
    return {LOCAL.get(name, name): content for name, content in files.items()}


def put(target: Path, path: str, content: bytes) -> None:
    (target / path).parent.mkdir(parents=True, exist_ok=True)
    (target / path).write_bytes(content)


@pytest.mark.parametrize("model", ["7b", "13b-Instruct"])
def test_a_model_arrives_whole(mirror: Mirror, target: Path, downloader: str, model: str) -> None:
    mirror.files |= model_files(model)
    output = run(target, PRESIGNED_URL=mirror.url, MODELS=model, DOWNLOADER=downloader)
    assert contents(target) == mirror.files
    assert sorted(path for path, _, _ in mirror.requests) == sorted(mirror.files)
    assert f"CodeLlama-{model}: complete" in output


def test_query_of_the_signed_url_survives(mirror: Mirror, target: Path, downloader: str) -> None:
    mirror.files |= model_files("7b")
    run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER=downloader)
    assert {query for _, query, _ in mirror.requests} == {QUERY}


def test_an_interrupted_shard_is_resumed(mirror: Mirror, target: Path, downloader: str) -> None:
    mirror.files |= model_files("7b")
    shard = "CodeLlama-7b/consolidated.00.pth"
    put(target, f"{shard}.part", mirror.files[shard][:HALF])
    run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER=downloader)
    assert mirror.starts(shard) == [HALF]
    assert contents(target) == mirror.files


def test_a_complete_part_is_only_renamed(mirror: Mirror, target: Path, downloader: str) -> None:
    mirror.files |= model_files("7b")
    shard = "CodeLlama-7b/consolidated.00.pth"
    put(target, f"{shard}.part", mirror.files[shard])
    run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER=downloader)
    assert mirror.starts(shard) == [len(mirror.files[shard])]
    assert contents(target) == mirror.files


def test_a_part_of_something_else_is_downloaded_anew(mirror: Mirror, target: Path, downloader: str) -> None:
    mirror.files |= model_files("7b")
    shard = "CodeLlama-7b/consolidated.00.pth"
    put(target, f"{shard}.part", b"x" * HALF)
    run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER=downloader)
    assert mirror.starts(shard) == [HALF, None]
    assert contents(target) == mirror.files


def test_a_server_without_ranges_is_no_obstacle(mirror: Mirror, target: Path, downloader: str) -> None:
    mirror.files |= model_files("7b")
    mirror.ranges = False
    shard = "CodeLlama-7b/consolidated.00.pth"
    put(target, f"{shard}.part", mirror.files[shard][:HALF])
    run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER=downloader)
    assert contents(target) == mirror.files


def test_a_second_run_requests_nothing(mirror: Mirror, target: Path, downloader: str) -> None:
    mirror.files |= model_files("13b")
    run(target, PRESIGNED_URL=mirror.url, MODELS="13b", DOWNLOADER=downloader)
    mirror.requests.clear()
    run(target, PRESIGNED_URL=mirror.url, MODELS="13b", DOWNLOADER=downloader)
    assert mirror.requests == []
    assert contents(target) == mirror.files


def test_a_truncated_file_under_a_final_name_is_completed(mirror: Mirror, target: Path, downloader: str) -> None:
    mirror.files |= model_files("13b")
    shard = "CodeLlama-13b/consolidated.01.pth"
    put(target, shard, mirror.files[shard][:HALF])
    run(target, PRESIGNED_URL=mirror.url, MODELS="13b", DOWNLOADER=downloader)
    assert mirror.starts(shard) == [HALF]
    assert contents(target) == mirror.files


def test_a_dropped_connection_is_continued(mirror: Mirror, target: Path, downloader: str) -> None:
    mirror.files |= model_files("7b")
    shard = "CodeLlama-7b/consolidated.00.pth"
    mirror.drop_after[shard] = HALF
    run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER=downloader)
    assert mirror.starts(shard) == [None, HALF]
    assert contents(target) == mirror.files


def test_a_killed_download_never_looks_whole(mirror: Mirror, target: Path, downloader: str) -> None:
    mirror.files |= model_files("7b")
    mirror.stuck = shard = "CodeLlama-7b/consolidated.00.pth"
    with subprocess.Popen(
        ["bash", str(SCRIPT)],
        env=environment_for(target) | {"PRESIGNED_URL": mirror.url, "MODELS": "7b", "DOWNLOADER": downloader},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert mirror.half_sent.wait(20)
        os.killpg(process.pid, signal.SIGTERM)  # the downloader too, as the terminal does
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "run this script again to continue" in output
    assert not (target / shard).exists()
    run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER=downloader)
    assert contents(target) == mirror.files


def test_a_busy_server_is_asked_again(mirror: Mirror, target: Path, downloader: str) -> None:
    mirror.files |= model_files("7b")
    mirror.statuses["LICENSE"] = [503, 429, 500]
    run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER=downloader)
    assert len(mirror.starts("LICENSE")) == 4
    assert contents(target) == mirror.files


def test_a_server_that_stays_broken_is_given_up(mirror: Mirror, target: Path, downloader: str) -> None:
    mirror.statuses["LICENSE"] = [503] * 20
    output = run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER=downloader, returncode=1)
    assert len(mirror.starts("LICENSE")) == 5
    assert "gave up LICENSE" in output
    assert "HTTP status 503" in output
    assert contents(target) == {}


def test_no_server_at_all_is_reported(mirror: Mirror, target: Path, downloader: str) -> None:
    url = f"http://127.0.0.1:1/*?{QUERY}"
    output = run(target, PRESIGNED_URL=url, MODELS="7b", DOWNLOADER=downloader, returncode=1)
    assert "gave up LICENSE after 5 requests to 127.0.0.1:1" in output


@pytest.mark.parametrize("path", ["LICENSE", "CodeLlama-7b/consolidated.00.pth"])
def test_403_says_that_the_url_has_expired(mirror: Mirror, target: Path, downloader: str, path: str) -> None:
    mirror.files |= model_files("7b")
    mirror.forbidden = {path}
    output = run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER=downloader, returncode=1)
    assert "has expired" in output
    assert "Ask for a new one at https://" in output
    assert len(mirror.starts(path)) == 1
    assert not (target / path).exists()
    assert not (target / f"{path}.part").exists()


def test_403_keeps_what_was_downloaded_before(mirror: Mirror, target: Path, downloader: str) -> None:
    mirror.files |= model_files("7b")
    shard = "CodeLlama-7b/consolidated.00.pth"
    put(target, f"{shard}.part", mirror.files[shard][:HALF])
    mirror.forbidden = {shard}
    run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER=downloader, returncode=1)
    assert (target / f"{shard}.part").read_bytes() == mirror.files[shard][:HALF]
    assert not (target / shard).exists()


def test_another_http_error_is_named(mirror: Mirror, target: Path, downloader: str) -> None:
    mirror.files |= model_files("7b")
    del mirror.files["CodeLlama-7b/params.json"]
    output = run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER=downloader, returncode=1)
    assert "HTTP 404 from 127.0.0.1" in output
    assert "CodeLlama-7b/params.json" in output
    assert len(mirror.starts("CodeLlama-7b/params.json")) == 1


@pytest.mark.parametrize("path", ["LICENSE", "CodeLlama-7b/checklist.chk", "CodeLlama-7b/consolidated.00.pth"])
def test_a_login_page_is_no_file(mirror: Mirror, target: Path, downloader: str, path: str) -> None:
    mirror.files |= model_files("7b")
    mirror.files[path] = PAGE
    output = run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER=downloader, returncode=1)
    assert f"sent a login page instead of {path}" in output
    assert path not in contents(target)
    assert f"{path}.part" not in contents(target)
    assert list(target.rglob("*.pth")) == []


def test_a_login_page_does_not_cost_a_partial_shard(mirror: Mirror, target: Path, downloader: str) -> None:
    mirror.files |= model_files("7b")
    shard = "CodeLlama-7b/consolidated.00.pth"
    for path in mirror.files.keys() - {shard}:
        put(target, path, mirror.files[path])
    put(target, f"{shard}.part", mirror.files[shard][:HALF])
    whole, mirror.files[shard] = mirror.files[shard], PAGE
    mirror.ranges, mirror.content_type = False, "text/html; charset=utf-8"
    output = run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER=downloader, returncode=1)
    assert "login page" in output
    assert (target / f"{shard}.part").read_bytes() == whole[:HALF]


def test_login_pages_left_by_an_older_download_are_replaced(mirror: Mirror, target: Path, downloader: str) -> None:
    mirror.files |= model_files("7b")
    for path in mirror.files:
        put(target, path, PAGE)
    run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER=downloader)
    assert contents(target) == mirror.files


def test_a_wrong_md5_is_named_and_the_rest_is_kept(mirror: Mirror, target: Path, downloader: str) -> None:
    mirror.files |= model_files("13b") | model_files("7b")
    wrong = "CodeLlama-13b/consolidated.01.pth"
    mirror.files[wrong] = b"x" * len(mirror.files[wrong])
    output = run(target, PRESIGNED_URL=mirror.url, MODELS="13b 7b", DOWNLOADER=downloader, returncode=1)
    assert f"these files are wrong or missing: {wrong}." in output
    assert "CodeLlama-7b: complete" in output
    assert "CodeLlama-13b: complete" not in output
    assert contents(target) == {path: content for path, content in mirror.files.items() if path != wrong}


def test_a_checklist_that_leaves_out_a_shard_is_refused(mirror: Mirror, target: Path) -> None:
    mirror.files |= model_files("13b")
    listed = mirror.files["CodeLlama-13b/checklist.chk"].splitlines(keepends=True)
    mirror.files["CodeLlama-13b/checklist.chk"] = b"".join(line for line in listed if b".01.pth" not in line)
    output = run(target, PRESIGNED_URL=mirror.url, MODELS="13b", returncode=1)
    assert "checklist.chk is not a list of md5 sums that names consolidated.00.pth consolidated.01.pth" in output
    assert list(target.rglob("*.pth")) == []


def test_a_file_that_only_the_checklist_knows_is_missed(mirror: Mirror, target: Path) -> None:
    mirror.files |= model_files("7b")
    mirror.files["CodeLlama-7b/checklist.chk"] += b"0" * 32 + b"  extra.bin\n"
    output = run(target, PRESIGNED_URL=mirror.url, MODELS="7b", returncode=1)
    assert "these files are wrong or missing: CodeLlama-7b/extra.bin." in output


def test_a_checklist_may_look_different(mirror: Mirror, target: Path) -> None:
    mirror.files |= model_files("7b")
    path = "CodeLlama-7b/checklist.chk"
    lines = [line.split() for line in mirror.files[path].decode().splitlines()]
    mirror.files[path] = "\r\n".join(f"{md5.upper()} *./{name}" for md5, name in lines).encode()
    output = run(target, PRESIGNED_URL=mirror.url, MODELS="7b")
    assert "CodeLlama-7b: complete" in output
    assert contents(target) == mirror.files


def programs_in(folder: Path, *names: str) -> str:
    """Fill a folder with the programs that download.sh needs and the named ones; return it as a PATH."""
    folder.mkdir()
    for name in ("awk", "bash", "cat", "head", "mkdir", "mktemp", "mv", "rm", "sleep", "tr", "wc", *names):
        (folder / name).symlink_to(str(shutil.which(name)))
    return str(folder)


def test_md5_of_macos_serves_as_well(mirror: Mirror, target: Path, tmp_path: Path, downloader: str) -> None:
    path = programs_in(tmp_path / "bin", downloader)
    md5 = tmp_path / "bin" / "md5"
    md5.write_text(
        f"#!{sys.executable} -I\n"
        "import hashlib, pathlib, sys\n"
        'assert sys.argv[1] == "-q"\n'
        "sys.stdout.write(hashlib.md5(pathlib.Path(sys.argv[2]).read_bytes()).hexdigest())\n"
    )
    md5.chmod(0o755)
    mirror.files |= model_files("7b")
    wrong = "CodeLlama-7b/params.json"
    mirror.files[wrong] = b'{"dim": 9}\n'
    output = run(target, PRESIGNED_URL=mirror.url, MODELS="7b", PATH=path, returncode=1)
    assert f"these files are wrong or missing: {wrong}." in output
    assert contents(target) == {path: content for path, content in mirror.files.items() if path != wrong}


@pytest.mark.parametrize(
    ("programs", "message"),
    [(["md5sum"], "found neither GNU wget 1.x nor curl"), (["curl"], "found neither md5sum nor md5")],
)
def test_a_missing_program_is_named_first(
    mirror: Mirror, target: Path, tmp_path: Path, programs: list[str], message: str
) -> None:
    for name in programs:
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not on the PATH")
    path = programs_in(tmp_path / "bin", *programs)
    assert message in run(target, PRESIGNED_URL=mirror.url, MODELS="7b", PATH=path, returncode=1)
    assert mirror.requests == []


def test_url_and_models_are_read_from_standard_input(mirror: Mirror, target: Path) -> None:
    mirror.files |= model_files("7b") | model_files("13b-Python")
    output = run(target, stdin=f"  {mirror.url} \r\n7b,13b-Python 7b\n")
    assert "7b 12.55, 13b 24, 34b 63, 70b 131" in output
    assert output.count("CodeLlama-7b: complete") == 1
    assert contents(target) == mirror.files


def test_an_empty_answer_means_all_models(mirror: Mirror, target: Path) -> None:
    for model in MODELS:
        mirror.files |= model_files(model)
    run(target, stdin=f"{mirror.url}\n\n")
    assert contents(target) == mirror.files


def test_an_empty_variable_means_all_models(mirror: Mirror, target: Path) -> None:
    mirror.files |= model_files("7b")
    output = run(target, PRESIGNED_URL=mirror.url, MODELS="", returncode=1)  # 13b, which comes next, is not there
    assert "CodeLlama-7b: complete" in output
    assert "HTTP 404 from 127.0.0.1" in output
    assert mirror.requests[-1][0] == "CodeLlama-13b/checklist.chk"


def test_no_answer_downloads_nothing(mirror: Mirror, target: Path) -> None:
    output = run(target, stdin=f"{mirror.url}\n", returncode=1)
    assert "standard input ended" in output
    assert mirror.requests == []


def test_an_unknown_model_fails_before_any_request(mirror: Mirror, target: Path) -> None:
    output = run(target, PRESIGNED_URL=mirror.url, MODELS="7b, 7B-chat", returncode=1)
    assert "unknown model 7B-chat" in output
    assert sorted(output.partition("known are: ")[2].split()) == sorted(MODELS)
    assert mirror.requests == []
    assert not target.exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://download.example/x?Signature=s", "must have a * in its path"),
        ("https://download.example/x?Signature=*", "must have a * in its path"),
        ("ftp://download.example/*?Signature=s", "must begin with https://"),
        ("download.example/*?Signature=s", "must begin with https://"),
        ("https://*?Signature=s", "names no host"),
        ("https://download.example/* ?Signature=s", "another character that no URL holds"),
        ('https://download.example/*?Signature=s"', "another character that no URL holds"),
    ],
)
def test_a_url_that_cannot_be_right_is_refused(target: Path, url: str, message: str) -> None:
    assert message in run(target, PRESIGNED_URL=url, MODELS="7b", returncode=1)
    assert not target.exists()


def test_the_url_is_not_shown_where_it_does_not_belong(mirror: Mirror, target: Path) -> None:
    run(target, mirror.url, returncode=2)
    run(target, PRESIGNED_URL=mirror.url, MODELS=mirror.url, returncode=1)
    assert mirror.requests == []


def test_the_url_is_not_in_the_arguments_of_any_program(
    mirror: Mirror, target: Path, tmp_path: Path, downloader: str
) -> None:
    folder = tmp_path / "bin"
    path = programs_in(folder, "md5sum")
    (folder / downloader).write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" >>"{tmp_path}/log"\nenv >>"{tmp_path}/log"\n'
        f'exec "{shutil.which(downloader)}" "$@"\n'
    )
    (folder / downloader).chmod(0o755)
    mirror.files |= model_files("7b")
    run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER=downloader, PATH=f"{path}:/usr/bin:/bin")
    log = (tmp_path / "log").read_text()
    assert "LICENSE.part" in log
    assert "Signature" not in log


@pytest.mark.parametrize("flag", ["--models", "-x", "7b"])
def test_unknown_arguments_are_refused(mirror: Mirror, target: Path, flag: str) -> None:
    output = run(target, flag, PRESIGNED_URL=mirror.url, MODELS="7b", returncode=2)
    assert "unknown argument" in output
    assert mirror.requests == []


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_models_and_variables(target: Path, flag: str) -> None:
    words = run(target, flag).split()
    assert set(MODELS) <= set(words)
    assert {"PRESIGNED_URL", "MODELS", "TARGET", "DOWNLOADER"} <= set(words)


def test_an_unknown_downloader_is_refused(mirror: Mirror, target: Path) -> None:
    output = run(target, PRESIGNED_URL=mirror.url, MODELS="7b", DOWNLOADER="aria2c", returncode=1)
    assert "DOWNLOADER must be wget or curl, not aria2c" in output
    assert mirror.requests == []
