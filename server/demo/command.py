"""The command `shoal demo`: start everything, tell the story, print what came out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ... import ShoalError
from ...examples import watch
from ...proto.session import parse_url
from ..api.servers import SOCKET_PATH_BYTES_MAX
from ..errors import InvalidError
from . import people, report
from .display import Display, Lines, Steps
from .scenario import LoopError, Plan, Scenario
from .supervise import Supervisor, tail

SOCKET_NAME = "operator.sock"
STARTS_MAX = 3  # a process that died this often at the start will not come up
STATUS_S = 60.0  # `shoal-agent status` reads a few files; a machine with other work may stall


@dataclass(slots=True, kw_only=True)
class Demo:
    """One run of the demo: its processes, its folder, its story."""

    root: Path
    devices: int
    seed: int
    plan: Plan
    broker: str | None
    console_port: int | None
    """None = no console."""
    display: Display
    wearers: tuple[people.Wearer, ...] = ()
    console_url: str = ""
    _counts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what could only fail later.

        Raises:
            InvalidError: The state folder's path is too long for a socket.
            SessionError: The broker's address is none.
        """
        if len(os.fsencode(self.root / "server" / SOCKET_NAME)) > SOCKET_PATH_BYTES_MAX:
            raise InvalidError(
                f"the path {self.root} is too long for the server's socket",
                hint="name a folder with a shorter path by --state",
            )
        if self.broker is not None:
            parse_url(self.broker)

    async def run(self, *, stay: bool) -> dict[str, Any]:
        """Run the demo and return its report; with ``stay``, keep the console up until Ctrl-C."""
        here = asyncio.current_task()
        if here is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, here.cancel)
        start_s = time.monotonic()
        supervisor = Supervisor(on_restart=self._restarted)
        watching = asyncio.create_task(supervisor.run())
        try:
            scenario = await self._start(supervisor)
            failure = ""
            try:
                await scenario.run(self.root / "dataset.npz")
                await scenario.settle()
            except LoopError as exc:
                failure = str(exc)
            roles = {each.name: each for each in supervisor.children}
            commands = {each.name: (each.command, each.log) for each in supervisor.children}
            await self._stop_devices(supervisor)
            await self._count()
            summary = await self._drained(scenario)
            found = report.build(
                scenario.story,
                self.wearers,
                seed=self.seed,
                summary=summary,
                devices=self._counts,
                processes={
                    name: {
                        "role": "agent" if name.startswith("wrist-") else name,
                        "restarts": child.restarts,
                        "rss_mb_max": round(child.rss_bytes_max / 1e6, 1),
                    }
                    for name, child in roles.items()
                },
                took_s=time.monotonic() - start_s,
            )
            if failure:
                found["failures"].insert(0, failure)
                found["closed"] = False
            self.display.end(ok=found["closed"])
            if stay:
                for device in [each.device for each in self.wearers]:
                    command, log = commands[device]
                    supervisor.start(device, command, log=log)
                self._invite(found)
                await _until_interrupted()
            return found
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            await supervisor.stop_all()

    # --- starting ----------------------------------------------------------------------------

    async def _start(self, supervisor: Supervisor) -> Scenario:
        self.display.begin("start")
        data = watch.load()
        self.wearers = people.draw(data, devices=self.devices, seed=self.seed)
        broker = self.broker or f"mqtt://127.0.0.1:{_free_port()}"
        if self.broker is None:
            port = broker.rsplit(":", 1)[1]
            command = [sys.executable, "-m", "shoal.server.broker", "--port", port]
            supervisor.start("broker", command, log=self.root / "broker.log")
        self._write_server(broker)
        config = self.root / "server.toml"
        command = [
            sys.executable,
            "-m",
            "shoal.server.cli",
            "server",
            "run",
            "--config",
            str(config),
        ]
        supervisor.start("server", command, log=self.root / "server.log")
        self.display.detail("server and broker are starting")
        people.write_dataset(self.root / "dataset.npz", data, self.wearers)
        for wearer in self.wearers:
            home = self.root / wearer.device
            home.mkdir()
            people.write_recording(home / "recording.npz", data, wearer, seed=self.seed)
        scenario = Scenario(
            self.root / "server" / SOCKET_NAME,
            self.wearers,
            plan=self.plan,
            display=self.display,
            seed=self.seed,
        )
        tokens = await self._tokens(scenario, supervisor)
        for wearer in self.wearers:
            self._write_agent(wearer.device, tokens[wearer.device])
            config = self.root / wearer.device / "agent.toml"
            command = [sys.executable, "-m", "shoal.agent.main", "run", "--config", str(config)]
            supervisor.start(wearer.device, command, log=self.root / wearer.device / "agent.log")
        self.display.detail(f"{len(self.wearers)} devices are enrolling")
        return scenario

    async def _tokens(self, scenario: Scenario, supervisor: Supervisor) -> dict[str, str]:
        """Return the devices' tokens; give up when server or broker cannot be kept alive."""
        asking = asyncio.create_task(scenario.tokens())
        while not asking.done():
            await asyncio.wait([asking], timeout=0.2)
            for child in supervisor.children:
                if child.restarts >= STARTS_MAX and not asking.done():
                    asking.cancel()
                    await asyncio.wait([asking])
                    raise LoopError(
                        f"the {child.name} does not stay up; its log ends:\n{tail(child.log)}"
                    )
        return asking.result()

    def _write_server(self, broker: str) -> None:
        ports = {name: _free_port() for name in ("enrolment", "devices")}
        lines = [
            'state_dir = "server"',
            'fleet = "demo"',
            "[listen]",
            f'enrolment = "127.0.0.1:{ports["enrolment"]}"',
            f'devices = "127.0.0.1:{ports["devices"]}"',
            "[broker]",
            f'url = "{broker}"',
            # Two minutes of ten devices are few labels: a wave passes when a loss of ten points can
            # be ruled out (five is the default, and takes about 600 labels).
            "[rollouts.gate]",
            "accuracy_drop_max = 0.1",
            # All devices share this machine with whatever else it does, so one busy second is in
            # the last wave's calls and not in those of before (seen: 0.65 ms after 0.13). A window
            # must be answered before the next comes, 33 ms later: 256 times 0.13 ms.
            "latency_factor_max = 256",
        ]
        if self.console_port is not None:
            port = self.console_port or _free_port()
            self.console_url = f"http://127.0.0.1:{port}/"
            lines += ["[console]", "enabled = true", f"port = {port}"]
        else:
            lines += ["[console]", "enabled = false"]
        (self.root / "server.toml").write_text("\n".join(lines) + "\n")

    def _write_agent(self, device: str, token: str) -> None:
        home = self.root / device
        secret = home / "token"
        secret.touch(mode=0o600)
        secret.write_text(token)
        # Windows at 30 per second: a recording of some minutes passes in a third of a minute.
        (home / "agent.toml").write_text(
            'state_dir = "state"\n'
            "drain_s = 30.0\n"
            "[enrolment]\n"
            'token_file = "token"\n'
            "[source]\n"
            'path = "recording.npz"\n'
            "rate_hz = 30.0\n"
            "label_delay_s = 2.0\n"
            "[monitor]\n"
            "window_predictions = 60\n"
            "[trial]\n"
            "predictions = 20\n"
        )

    # --- counting ----------------------------------------------------------------------------

    async def _stop_devices(self, supervisor: Supervisor) -> None:
        """End the devices in good order: what they still hold is sent first."""
        await supervisor.stop([each.device for each in self.wearers], wait_s=45)

    async def _count(self) -> None:
        """Ask each device's own command for its own counts.

        Raises:
            LoopError: One of them failed, or did not answer in time.
        """

        async def ask(device: str) -> None:
            config = self.root / device / "agent.toml"
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "shoal.agent.main", "status", "--config", str(config),
                "-o", "json",
                stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            try:
                async with asyncio.timeout(STATUS_S):
                    out, _ = await process.communicate()
            except TimeoutError:
                raise LoopError(f"the status of {device} took more than {STATUS_S:g} s") from None
            finally:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
            if process.returncode:
                raise LoopError(f"the status of {device} could not be read")
            self._counts[device] = json.loads(out)["totals"]

        for start in range(0, len(self.wearers), 4):  # a few at a time: each is a process
            asked = [ask(each.device) for each in self.wearers[start : start + 4]]
            # All of them end before one's error goes on: none may be left to end its process alone.
            for ended in await asyncio.gather(*asked, return_exceptions=True):
                if ended is not None:
                    raise ended

    async def _drained(self, scenario: Scenario) -> dict[str, Any]:
        """Return the server's summary once it has caught up with what devices know to be stored."""
        acknowledged = sum(each["acknowledged"] for each in self._counts.values())
        deadline_s = time.monotonic() + 20
        while True:
            summary = await scenario.summary()
            stored = summary["totals"]["stored"]
            if stored >= acknowledged or time.monotonic() > deadline_s:
                return summary
            await asyncio.sleep(0.2)

    # --- telling -----------------------------------------------------------------------------

    def _restarted(self, name: str, status: int) -> None:
        why = signal.Signals(-status).name if status < 0 else f"status {status}"
        self.display.note(f"{name} died ({why})")

    def _invite(self, found: dict[str, Any]) -> None:
        screen = Console(stderr=True)
        report.show(found, screen)
        screen.print(
            f"\n  The console is at [bold]{self.console_url}[/]   (Ctrl-C ends the demo)\n"
        )


async def _until_interrupted() -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@click.command()
@click.option(
    "--devices",
    type=click.IntRange(2, 64),
    default=10,
    show_default=True,
    help="Number of devices, 2 to 64.",
)
@click.option("--seconds", default=90.0, show_default=True, help="Length of the run to aim at, s.")
@click.option("--seed", default=0, show_default=True, help="Draws who is unseen, and all else.")
@click.option("--rounds", default=Plan().rounds, show_default=True, help="Federated rounds.")
@click.option("--broker", metavar="URL", help="Use this MQTT 5 broker, mqtt://host:port.")
@click.option("--console/--no-console", default=True, help="Serve the console while it runs.")
@click.option("--console-port", default=0, help="Port of the console; 0 = any free one.")
@click.option("--report", "report_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep all state and logs in this folder (new or empty); a temporary one by default.",
)
def demo(
    devices: int,
    seconds: float,
    seed: int,
    rounds: int,
    broker: str | None,
    console: bool,
    console_port: int,
    report_path: Path | None,
    state: Path | None,
) -> None:
    """Run the whole loop on this machine with real data and real processes.

    Ten devices replay smartwatch recordings; a first model is trained on seven people and rolled
    out; three people were never seen, drift and lose accuracy; the devices learn together, and
    the better model reaches them all. Exits 0 only when the loop closed.
    """
    screen = Console(stderr=True)
    terminal = screen.is_terminal
    display: Display = Steps(screen) if terminal else Lines(Console(file=sys.stdout))
    plan = replace(Plan(), seconds=seconds, rounds=rounds)
    with contextlib.ExitStack() as stack:
        if state is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-")))
        else:
            if state.exists() and any(state.iterdir()):
                raise InvalidError(f"{state} is not empty", hint="name a new folder with --state")
            state.mkdir(parents=True, exist_ok=True)
            root = state.resolve()
        running = Demo(
            root=root,
            devices=devices,
            seed=seed,
            plan=plan,
            broker=broker,
            console_port=console_port if console else None,
            display=display,
        )
        try:
            running.check()
            found = asyncio.run(running.run(stay=terminal and console))
        except asyncio.CancelledError:  # SIGTERM: the children are ended, the folder goes
            display.end(ok=False)
            raise click.exceptions.Exit(143) from None
        except ShoalError as exc:
            display.end(ok=False)
            if state is None:
                kept = Path(tempfile.mkdtemp(prefix="shoal-failed-"))
                shutil.copytree(
                    root, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock")
                )
                exc.hint = exc.hint or f"logs are kept in {kept}"
            raise
        except KeyboardInterrupt:
            display.end(ok=False)
            raise click.exceptions.Exit(130) from None
        if report_path is not None:
            report_path.write_text(json.dumps(found, indent=1) + "\n")
        if not (terminal and console):
            report.show(found, Console(file=sys.stdout))
        raise click.exceptions.Exit(0 if found["closed"] else 1)
