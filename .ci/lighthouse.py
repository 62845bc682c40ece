"""Ask Lighthouse about every page of the built site, as on a desk and served as by GitHub Pages, and print its scores.

It ends with 1 and what cost a score that is below the floor, and with 3 where there is no chromium, npx or registry.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SITE = Path(__file__).resolve().parent.parent / "_build" / "html"
LIGHTHOUSE = ["npx", "--yes", "--prefer-offline", "lighthouse@12.8.2"]  # the last for Node 20
FLAGS = ["--output=json", "--quiet", "--disable-full-page-screenshot", "--preset=desktop"]
CATEGORIES = ["performance", "accessibility", "best-practices", "seo"]
FLOOR = 0.95
TRIES = 3  # of which the best counts: other work on the machine makes a page slow, and none makes it fast


class Compressed(SimpleHTTPRequestHandler):
    """Serves text compressed and keeps the connection."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Say nothing."""

    def do_GET(self):
        """Serve a file."""
        path = Path(self.translate_path(self.path))
        if path.suffix not in {".html", ".css", ".js", ".svg"} or not path.is_file():
            super().do_GET()
            return
        body = gzip.compress(path.read_bytes())
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(path))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def missing():
    """Say whether there is something that Lighthouse takes and that is not here."""
    if not (shutil.which("npx") and shutil.which("chromium")):
        return True
    quick = {"npm_config_fetch_retries": "0", "npm_config_fetch_timeout": "20000"}
    return bool(subprocess.run([*LIGHTHOUSE, "--version"], env=os.environ | quick).returncode)


def ask(url):
    """Return Lighthouse's report on a page."""
    command = [*LIGHTHOUSE, url, *FLAGS, "--chrome-flags=--headless=new --no-sandbox"]
    environment = os.environ | {"CHROME_PATH": shutil.which("chromium")}
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


def scores(report):
    return [report["categories"][name]["score"] or 0 for name in CATEGORIES]


def lost(report):
    """Return what cost a report its points, a line each."""
    parts = [part for name in CATEGORIES for part in report["categories"][name]["auditRefs"] if part["weight"]]
    for audit in (report["audits"][part["id"]] for part in parts):
        if (audit["score"] or 0) < 0.9 and audit["scoreDisplayMode"] != "notApplicable":
            nodes = [item["node"]["snippet"] for item in audit.get("details", {}).get("items", []) if "node" in item]
            yield f"  {audit['title']} {audit.get('displayValue', '')} {' '.join(nodes[:3])}"


def main():
    """Ask about all pages."""
    if missing():
        print("Lighthouse cannot be had here: it takes chromium, npx of Node 20, and npm's registry the first time.")
        return 3
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Compressed, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    low = []
    print(f"{'page':<26}", *CATEGORIES, "tries")
    for path in sorted(path for path in SITE.rglob("*.html") if "_static" not in path.parts):
        page, reports = path.relative_to(SITE).as_posix(), []
        while len(reports) < TRIES and (not reports or scores(reports[-1])[0] < FLOOR):
            reports.append(ask(f"http://127.0.0.1:{server.server_port}/{page}"))
        best = max(reports, key=scores)
        cells = [f"{round(100 * score):>{len(name)}}" for name, score in zip(CATEGORIES, scores(best), strict=True)]
        print(f"{page:<26}", *cells, f"{len(reports):>5}", flush=True)
        if min(scores(best)) < FLOOR:
            low += [page, *lost(best)]
    print(*low, sep="\n")
    return bool(low)


if __name__ == "__main__":
    sys.exit(main())
