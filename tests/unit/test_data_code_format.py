"""StarCoder's code format: repository, file name and stars, each now and then, and the newline only after one."""

import pytest

from starcoder_trainer.data.code_format import Repository, as_document, star_bucket
from starcoder_trainer.data.tokenizer import CodeTokenizer
from tests.support.corpora import vocabulary

TOKENIZER = CodeTokenizer(vocabulary())
REPO, FILE, STARS = (TOKENIZER.id(t) for t in ("<reponame>", "<filename>", "<gh_stars>"))


def documents(repository, count=2000):
    return [as_document("code", f"p{i}.py", repository, 1, TOKENIZER) for i in range(count)]


def test_parts_are_written_in_order_with_a_newline_before_the_code_where_there_is_one():
    seen = {tuple(d) for d in (as_document("code", "p.py", Repository("r", 7), s, TOKENIZER) for s in range(2000))}
    repo, file, stars = (REPO, "r"), (FILE, "p.py"), (STARS, "1-10")
    assert seen == {
        ("code",),
        *((*parts, "\ncode") for parts in (repo, file, stars, repo + file, repo + stars, file + stars)),
        (*repo, *file, *stars, "\ncode"),
    }


@pytest.mark.parametrize("token", [REPO, FILE, STARS])
def test_each_is_there_for_a_fifth_of_the_files(token):
    found = sum(token in d for d in documents(Repository("r", 50)))
    assert abs(found / 2000 - 0.2) < 0.04


def test_stars_that_nobody_knows_are_never_written_and_change_nothing_else():
    with_stars, without = documents(Repository("r", 50)), documents(Repository("r"))
    assert not any(STARS in d for d in without)
    assert [REPO in d for d in with_stars] == [REPO in d for d in without]


def test_the_same_file_is_always_written_the_same():
    assert documents(Repository("r"), 50) == documents(Repository("r"), 50)


@pytest.mark.parametrize(
    ("stars", "bucket"),
    [(0, "0"), (1, "1-10"), (10, "1-10"), (11, "10-100"), (1000, "100-1000"), (1001, "1000+")],
)
def test_stars_are_written_as_buckets(stars, bucket):
    assert star_bucket(stars) == bucket
