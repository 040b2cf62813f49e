"""A stand-in for the hub: its cache on this disk, and its server on this machine."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(cache, repo, folder, commit=COMMIT, branch="main"):
    """Put a folder into a hub's cache as huggingface_hub would: blobs under their hashes, and links to them."""
    place = Path(cache) / f"models--{repo.replace('/', '--')}"
    (place / "blobs").mkdir(parents=True, exist_ok=True)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / branch).write_text(commit)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = place / "blobs" / etag_of(file)
        blob.write_bytes(file.read_bytes())
        link = place / "snapshots" / commit / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(link.relative_to(place).parts) - 1)) / "blobs" / blob.name)
    return place / "snapshots" / commit


def etag_of(file):
    """Return what the hub calls a file: SHA-256 of large ones, git's SHA-1 of small ones."""
    content = file.read_bytes()
    if file.suffix in (".safetensors", ".bin", ".gguf"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve(repo, folder, commit=COMMIT):
    """Serve a folder as the hub serves a repository; yields the address and the paths that were asked for."""
    asked = []
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, content=b"", **headers):
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_GET(self):
            path = self.path.partition("?")[0]
            asked.append(path)
            if path.startswith(f"/api/models/{repo}"):
                rest = path.removeprefix(f"/api/models/{repo}")
                if rest.startswith("/tree"):
                    entries = [
                        {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": etag_of(folder / name)}
                        for name in names
                    ]
                    return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
                if rest.startswith("/revision/") and rest.removeprefix("/revision/") not in ("main", commit):
                    return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
                info = {"id": repo, "modelId": repo, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            name = path.removeprefix(f"/{repo}/resolve/").partition("/")[2]
            if path.startswith(f"/{repo}/resolve/") and name in names:
                facts = {"X_Repo_Commit": commit, "ETag": f'"{etag_of(folder / name)}"', "Accept_Ranges": "none"}
                return self.answer(200, (folder / name).read_bytes(), **facts)
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
