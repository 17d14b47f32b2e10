"""Write predictions to a file or to a URL."""

import hashlib
import os
import shutil
from pathlib import Path

from refract.cache_folder import cache_folder
from refract.pipeline.data.errors import DataError
from refract.pipeline.inference.batch_scoring import Options, Summary, score_all
from refract.remote.address import checked, is_remote

STAGING = "scores"


def score_to(bundle: str, source: str, out: str, options: Options) -> Summary:
    """Score every row of `source` and write `out`, a file or a URL.

    For a URL, the file is written to the cache folder first, and uploaded when it is complete. An interrupted scoring resumes there.
    Raises as `score_all`, and RemoteError if the file cannot be uploaded.
    """
    if not is_remote(out):
        return score_all(bundle, source, Path(out), options)
    from refract.remote import client

    url = checked(out)
    if not options.overwrite and client.exists(url):
        raise DataError(f"{url} exists already; --overwrite replaces it once the new file is complete")
    folder = cache_folder() / STAGING / hashlib.sha256(f"{url} {os.getuid()}".encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / url.rpartition("/")[2]
    file.unlink(missing_ok=True)  # of an upload that failed: its parts are gone, and the data may have changed
    summary = score_all(bundle, source, file, options)
    client.upload(file, url)
    shutil.rmtree(folder, ignore_errors=True)
    return summary
