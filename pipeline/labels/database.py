"""The database of a label history: an append-only table in a SQLite file or in PostgreSQL."""

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract.models.credentials import masked
from refract.pipeline.labels.decisions import ACTIONS, LabelDatabaseError, LabelError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

VERSION = 1
"""Version of the tables."""

BUSY_SECONDS = 30
"""How long a process waits for the writes of others."""

_COLUMNS = f"""
    recorded TEXT NOT NULL,
    time TEXT NOT NULL,
    content TEXT NOT NULL,
    path TEXT NOT NULL,
    action TEXT NOT NULL CHECK (action IN ({", ".join(f"'{action}'" for action in ACTIONS)})),
    labels TEXT NOT NULL,
    reviewer TEXT NOT NULL,
    reason TEXT NOT NULL,
    origin TEXT NOT NULL,
    seen BIGINT,
    undoes BIGINT REFERENCES label_decisions (id)
"""

_REFUSED = "records of a label history are never changed or deleted"

SQLITE_TABLES = f"""
BEGIN;
CREATE TABLE label_schema (version INTEGER NOT NULL);
INSERT INTO label_schema VALUES ({VERSION});
CREATE TABLE label_decisions (id INTEGER PRIMARY KEY AUTOINCREMENT, {_COLUMNS});
CREATE INDEX label_decisions_content ON label_decisions (content);
CREATE TRIGGER label_decisions_update BEFORE UPDATE ON label_decisions BEGIN SELECT RAISE(ABORT, '{_REFUSED}'); END;
CREATE TRIGGER label_decisions_delete BEFORE DELETE ON label_decisions BEGIN SELECT RAISE(ABORT, '{_REFUSED}'); END;
CREATE TRIGGER label_decisions_replace BEFORE INSERT ON label_decisions
    WHEN EXISTS (SELECT 1 FROM label_decisions WHERE id = NEW.id) BEGIN SELECT RAISE(ABORT, '{_REFUSED}'); END;
COMMIT;
"""

POSTGRES_TABLES = (
    "CREATE TABLE label_schema (version INTEGER NOT NULL)",
    f"INSERT INTO label_schema VALUES ({VERSION})",
    f"CREATE TABLE label_decisions (id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, {_COLUMNS})",
    "CREATE INDEX label_decisions_content ON label_decisions (content)",
    f"CREATE FUNCTION label_decisions_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION '{_REFUSED}'; END $$",
    "CREATE TRIGGER label_decisions_change BEFORE UPDATE OR DELETE OR TRUNCATE ON label_decisions "
    "FOR EACH STATEMENT EXECUTE FUNCTION label_decisions_refuse()",
)
_CREATION_LOCK = 0x7265667261
"""Key of the PostgreSQL lock under which the tables are created."""


class Database:
    """A label database. Each call opens a separate connection, so that threads and forked processes can share the object."""

    def __init__(self, address: str, *, create: bool) -> None:
        """address: a file, or a URL `postgresql://…`; create: create what does not exist. LabelError, LabelDatabaseError."""
        self.address = masked(address)
        self._is_file = "://" not in address
        self.folder: Path | None = None
        if self._is_file:
            file = _target(Path(address))
            self.folder = file.absolute().parent
            self._engine = _sqlite_engine(file, create=create)
        else:
            self._engine = _postgres_engine(address)
        self._check_tables(create=create)

    @contextmanager
    def reading(self) -> "Iterator[Connection]":
        """Yield a connection that sees one state of the database. It waits for no writer."""
        with self._named_errors(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> "Iterator[Connection]":
        """Yield a connection whose transaction is committed, on disk, at the end of the block. One process writes at a time."""
        with self._named_errors(), self._engine.execution_options(refract_writes=True).begin() as connection:
            if not self._is_file:
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{BUSY_SECONDS}s'")
                connection.exec_driver_sql("SET LOCAL synchronous_commit = on")
                # One writer at a time: IDs are then in the order of the commits, as in SQLite.
                connection.exec_driver_sql("LOCK TABLE label_decisions IN EXCLUSIVE MODE")
            yield connection

    def _check_tables(self, *, create: bool) -> None:
        """Raise LabelError for another database, or one of a later version. Create the tables in PostgreSQL."""
        from sqlalchemy import inspect

        with self._named_errors(), self._engine.begin() as connection:
            if not self._is_file:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_CREATION_LOCK})")
            exists = inspect(connection).has_table("label_schema")
            if not exists and (self._is_file or not create):
                remedy = "choose another file" if self._is_file else _created_by(self.address)
                raise LabelError(f"{self.address}: is a database without a label history; {remedy}")
            if not exists:
                for statement in POSTGRES_TABLES:
                    connection.exec_driver_sql(statement)
            version = connection.exec_driver_sql("SELECT version FROM label_schema").scalar_one()
        if version != VERSION:
            raise LabelError(
                f"{self.address}: its tables have version {version}; this Refract reads version {VERSION}, upgrade it"
            )

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            why = masked((str(cause).splitlines() or [type(cause).__name__])[0])
            if "not a database" in why:
                raise LabelError(f"{self.address}: is not a label database ({why})") from error
            raise LabelDatabaseError(f"{self.address}: the label database failed: {why}") from error


def _created_by(address: str) -> str:
    return f"`refract labels set` and `refract labels import` with {address} create one"


def _target(path: Path) -> Path:
    """Return the path, or the file that a symbolic link names: SQLite keeps the files of WAL mode next to that file."""
    try:
        return path.resolve() if path.is_symlink() else path
    except RuntimeError:  # a link to itself, which cannot be opened
        return path


def _sqlite_engine(path: Path, *, create: bool) -> "Engine":
    from sqlalchemy import NullPool, create_engine, event

    if not path.exists():
        if not create:
            raise LabelError(f"{path}: no such label database (current folder: {Path.cwd()}); {_created_by(str(path))}")
        _create_file(path)

    engine = create_engine("sqlite://", creator=partial(_connect, path), poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # the transactions start below
        connection.execute("PRAGMA synchronous = FULL")  # a commit is on disk when it returns
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: "Connection") -> None:
        writes = connection.get_execution_options().get("refract_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _connect(path: Path) -> sqlite3.Connection:
    """Open a database that exists. In a folder without write access, it can be read if no process writes it."""
    uri = path.absolute().as_uri()
    # mode=rw: never create a file, which a move of the database would leave behind
    connection = sqlite3.connect(f"{uri}?mode=rw", uri=True, timeout=BUSY_SECONDS)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.OperationalError:  # the file of WAL mode's index cannot be created
        connection.close()
        if os.access(path.parent, os.W_OK) or Path(f"{path}-wal").exists():
            raise
        return sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True)
    return connection


def _create_file(path: Path) -> None:
    """Create the database atomically: other processes see no file, or the whole one."""
    if not path.parent.is_dir():
        raise LabelError(f"{path}: the folder {path.parent} does not exist; create it first")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        new = Path(temporary) / path.name
        with closing(sqlite3.connect(new)) as database:
            database.execute("PRAGMA journal_mode = WAL")  # stored in the file
            database.execute("PRAGMA synchronous = FULL")
            database.executescript(SQLITE_TABLES)
        try:
            os.link(new, path)
        except FileExistsError:
            pass  # another process created it first
        except OSError:  # a file system without hard links
            _move_if_new(new, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _move_if_new(new: Path, path: Path) -> None:
    """Move a file to a path that does not exist. Processes that do so at once wait for each other: none replaces the file of another."""
    import fcntl

    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if not path.exists():
            new.replace(path)
    finally:
        os.close(folder)


def _postgres_engine(address: str) -> "Engine":
    from sqlalchemy import NullPool, create_engine
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(address.replace("postgres://", "postgresql://", 1))
    except (ArgumentError, ValueError) as error:  # ValueError for a port that is not a number
        raise LabelError(
            f"{masked(address)}: is not an address; expected postgresql://USER@HOST/DATABASE or a file"
        ) from error
    if url.get_backend_name() != "postgresql":
        raise LabelError(f"{masked(address)}: expected a file, or an address that starts with postgresql://")
    if url.drivername == "postgresql":
        # The driver that the extra `retrain` installs. SQLAlchemy prefers psycopg 3.
        url = url.set(drivername="postgresql+psycopg2")
    try:
        return create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": BUSY_SECONDS})
    except ArgumentError as error:
        raise LabelError(
            f"{masked(address)}: the driver is unknown; expected postgresql://USER@HOST/DATABASE"
        ) from error
    except ImportError as error:
        raise LabelError(
            f"{masked(address)}: {error.name} is not installed; run pip install 'refract[train,retrain]'"
        ) from error
