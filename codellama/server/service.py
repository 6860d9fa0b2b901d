"""What the app may ask of a model, and the thread that answers: it loads the model, then runs the engine.

It knows nothing of HTTP, and loads no torch by itself: the one who builds the parts does.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from codellama.config import RuntimeArgs
from codellama.errors import CodeLlamaError, RankError
from codellama.generation.prompt import Prompt, PromptMaker
from codellama.generation.request import Delta, Request
from codellama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from codellama.assembly import Parts

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "failed", "stopped"]
OnDelta = Callable[[Delta], None]
Handle = Any  # what submit returned, and cancel takes; nothing else can be done with it


@dataclass(frozen=True)
class Status:
    """How a service is.

    Attributes:
        max_seq_len: tokens of prompt and generation together.
        max_batch_size: requests that run at once.
        running: those that do; waiting: those that have no row of the cache yet.
    """

    state: State
    max_seq_len: int
    max_batch_size: int
    running: int = 0
    waiting: int = 0


class NotReadyError(CodeLlamaError):
    """The model is still being loaded, or it is gone."""


class Service(Protocol):
    """All that the app knows of a model."""

    @property
    def prompts(self) -> PromptMaker:
        """Makes and checks prompts; raises NotReadyError before the model is loaded."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's; raises NotReadyError before the model is loaded."""

    def submit(self, prompt: Prompt, on_delta: OnDelta) -> Handle:
        """Start a prompt; on_delta is called from another thread, at last with a finish_reason."""

    def cancel(self, handle: Handle) -> None:
        """End what `submit` started; harmless when it has ended."""

    def status(self) -> Status:
        """Say how the service is; never waits."""


class EngineService:
    """A service on an engine of this process, which one thread loads and then steps.

    On a rank that is no leader, that thread follows instead, and nothing can be submitted.
    """

    def __init__(
        self,
        build: Callable[[], "Parts"],
        runtime: RuntimeArgs,
        on_end: Callable[[], None],
        on_ready: Callable[["Parts"], None] = lambda parts: None,
    ) -> None:
        """Prepare to serve; `start` begins to load.

        Args:
            build: makes the parts, in the thread that will run them.
            runtime: what the parts will have.
            on_end: called from the thread when no model could be loaded; where there are other ranks, also when the
                model failed, since the group then ends, and on those that follow when their leader lets them go.
            on_ready: called from the thread when requests are answered.
        """
        self._build = build
        self._runtime = runtime
        self._on_end = on_end
        self._on_ready = on_ready
        self._parts: Parts | None = None
        self._state: State = "loading"
        self._lock = threading.Lock()  # nothing enters the inbox after the state says that nobody reads it
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.error: BaseException | None = None

    def start(self) -> None:
        """Load the model, and run it, in a thread of its own."""
        self._thread.start()

    def stop(self, patience: float = 10.0) -> None:
        """Stop after the step that runs; requests that have not ended end as cancelled.

        Args:
            patience: seconds to wait for that step. A thread that still loads is not waited for.
        """
        with self._lock:
            parts = self._parts
            if self._state == "loading":
                self._state = "stopped"
        if parts is not None:
            parts.engine.stop()
            self._thread.join(patience)

    def fail(self, error: CodeLlamaError) -> None:
        """End everything for a reason outside of the engine, such as a process that is gone; safe from any thread."""
        with self._lock:
            if self.error is None:
                self.error = error
            self._state = "failed"
            if self._parts is not None:
                self._parts.engine.stop()

    @property
    def prompts(self) -> PromptMaker:
        """See Service."""
        return self._ready().prompts

    @property
    def tokenizer(self) -> Tokenizer:
        """See Service."""
        return self._ready().tokenizer

    def submit(self, prompt: Prompt, on_delta: OnDelta) -> Request:
        """See Service.

        Raises:
            NotReadyError: there is no model to run it.
        """
        with self._lock:
            parts = self._ready()
            request = parts.prompts.request(prompt)
            parts.engine.submit(request, on_delta)
        return request

    def cancel(self, handle: Request) -> None:
        """See Service."""
        with self._lock:
            if self._parts is not None and self._state == "ready":
                self._parts.engine.cancel(handle)

    def status(self) -> Status:
        """See Service."""
        parts = self._parts
        running, waiting = (0, 0) if parts is None else parts.engine.load()
        return Status(self._state, self._runtime.max_seq_len, self._runtime.max_batch_size, running, waiting)

    @property
    def began(self) -> bool:
        """True from when the model was loaded and its thread began to run it."""
        return self._parts is not None

    def _ready(self) -> "Parts":
        if self._state != "ready" or self._parts is None:
            raise NotReadyError(f"the model is not ready: it is {self._state}")
        return self._parts

    def _run(self) -> None:
        """Be the engine's thread."""
        try:
            parts = self._build()
        except BaseException as error:  # whatever it is: the main thread tells it, and ends the process
            self.error, self._state = self.error or error, "failed"
            self._on_end()
            return
        with self._lock:
            if self._state != "loading":  # nobody waits for it any more
                return
            self._parts, self._state = parts, "ready"
        self._on_ready(parts)
        try:
            with parts.parallel.as_replica().together():
                if parts.parallel.is_leader:
                    parts.engine.loop()
                    if self.error is not None:  # it came from outside, and those that follow are to know
                        raise self.error
                else:
                    parts.engine.follow()
        except RankError as error:  # one line says it all, and the main thread writes it
            self.error = self.error or error
        except BaseException as error:  # all requests have been told; /health tells everybody else
            if parts.parallel.is_leader:
                logger.exception("the model failed, and answers nothing from now on")
            self.error = self.error or error
        with self._lock:
            self._state = "stopped" if self.error is None else "failed"
        parts.engine.close()  # what came in between ends here
        if parts.parallel.world is not None and (self.error is not None or not parts.parallel.is_leader):
            self._on_end()
