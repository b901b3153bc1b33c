"""Where alerts arrive in tests: a mail server with STARTTLS and password, an HTTP endpoint that keeps all."""

from __future__ import annotations

import datetime
import email
import email.policy
import ipaddress
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from obsinfra.deployment.ports import free_port


@dataclass(frozen=True)
class Post:
    """One request: path, headers with lower-case names, and the body as JSON."""

    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Endpoint:
    """An HTTP server's address, what was posted to it, and what it answers."""

    port: int
    posts: list[Post] = field(default_factory=list)
    status: int = 200
    answer: bytes = b"ok"

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def at(self, path: str) -> list[Post]:
        """What came to one path, oldest first."""
        return [post for post in self.posts if post.path == path]

    def alerts(self, path: str, status: str = "firing") -> list[str]:
        """Names of the alerts in Alertmanager's webhooks to one path."""
        return [
            alert["labels"]["alertname"]
            for post in self.at(path)
            for alert in post.body["alerts"]
            if alert["status"] == status
        ]


@contextmanager
def http_endpoint() -> Iterator[Endpoint]:
    """Keeps each POST; answers all as Slack's incoming webhooks do, unless told otherwise."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            endpoint.posts.append(Post(self.path, headers, json.loads(body)))
            self.do_GET()

        def do_GET(self) -> None:
            self.send_response(endpoint.status)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(endpoint.answer)))
            self.end_headers()
            self.wfile.write(endpoint.answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint = Endpoint(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, name="http-endpoint")
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class MailServer:
    """Its address, the certificate that vouches for it, and what arrived, from whom and how."""

    port: int
    certificate: Path
    mails: list[EmailMessage] = field(default_factory=list)
    recipients: list[list[str]] = field(default_factory=list)
    encrypted: list[bool] = field(default_factory=list)
    users: list[bytes] = field(default_factory=list)


@contextmanager
def mail_server(folder: Path, user: str, password: str) -> Iterator[MailServer]:
    """Takes mail only after STARTTLS and from `user`."""
    certificate, key = _certificate(folder)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    server = MailServer(free_port("127.0.0.1", 0, set()), certificate)

    class Handler:
        async def handle_DATA(self, _server: Any, session: Any, envelope: Any) -> str:
            mail = email.message_from_bytes(envelope.content, policy=email.policy.default)
            assert isinstance(mail, EmailMessage)
            server.encrypted.append(session.ssl is not None)
            server.users.append(session.auth_data.login if session.authenticated else b"")
            server.recipients.append(list(envelope.rcpt_tos))
            server.mails.append(mail)
            return "250 OK"

    def authenticate(_server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
        right = isinstance(data, LoginPassword) and (data.login, data.password) == (
            user.encode(),
            password.encode(),
        )
        return AuthResult(success=right, handled=False, auth_data=data)

    controller = Controller(
        Handler(),
        hostname="127.0.0.1",
        port=server.port,
        tls_context=context,
        require_starttls=True,
        authenticator=authenticate,
        auth_required=True,
        # Its prompts for LOGIN are not those that Alertmanager knows; then PLAIN is what both speak.
        auth_exclude_mechanism=["LOGIN"],
    )
    controller.start()
    try:
        yield server
    finally:
        controller.stop()


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A self-made certificate for localhost and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "certificate.pem", folder / "key.pem"
