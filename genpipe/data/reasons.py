"""Why samples are rejected, and what to do about it."""

from __future__ import annotations

_AGAIN = "replace the file with an intact copy"
_RENAME = "rename the file"
_FILTER = "as filters say; relax them if too much is left out"

REMEDIES = {
    # The image
    "empty": _AGAIN,
    "truncated": _AGAIN,
    "corrupt": f"{_AGAIN}, or convert it to PNG",
    "not_an_image": "replace or delete the file: it is not an image, whatever its name says",
    "unsupported": "convert it to JPEG or PNG of 8 bits",
    "too_large": "scale it down, or raise max_image_pixels (of urls: fetch.max_bytes)",
    "no_image": "add the image, or name the column or suffix that holds it",
    "second_image": "rename it to make it a sample of its own, or name it in source.condition",
    "dotted_key": "rename it so that its name has no dot before the suffix",
    "missing_file": "add the image, or correct file_name",
    # What is beside it
    "no_caption": "add a caption, or name its field in source.captions",
    "bad_caption": "save captions as UTF-8 text, of at most 32,768 characters",
    "bad_metadata": "correct the line, as its detail says",
    "caption_without_image": "add the image, or rename one of the two",
    "no_label": "add the class, or leave source.label out",
    "bad_label": "correct the class, or list all names in source.classes",
    "new_class": "run the stage again: the class was not there when the source was listed",
    "no_condition": "add the conditioning image, or leave source.condition out",
    "condition_aspect": "give the conditioning image the aspect of its image",
    # Where it is
    "bad_name": _RENAME,
    "duplicate_key": "give each sample a key of its own, and keep a tar's members of one key together",
    "unreadable": "look at the file and at its permissions",
    "unsafe_path": "use paths relative to the table, without '..', or s3:// URIs",
    "unsafe_member": "write the tar anew with ordinary files only",
    "trailing_data": "unpack tars that were joined with cat, and pack them as one",
    "other_files": "convert images to PNG or JPEG; leave other files as they are",
    # URLs
    "bad_url": "correct the URL",
    "timeout": "run again later, or raise fetch.timeout",
    "connection": "run again later: the server cannot be reached",
    "tls": "the server's certificate is not valid; use another source",
    "private_address": "set fetch.allow_private if the address is yours",
    "too_many_redirects": "correct the URL, or raise fetch.max_redirects",
    "noai": "its owner forbids this use; fetch.disallowed decides what is respected",
    # Rules
    "too_small": _FILTER,
    "aspect": _FILTER,
    "caption_too_short": _FILTER,
    "caption_too_long": _FILTER,
    "junk_caption": _FILTER,
    "blocked": "nothing: it is on the blocklist",
    "duplicate_image": "nothing: the first copy is kept",
    "near_duplicate": "nothing: the first copy is kept; lower filters.near_duplicates if the images differ",
    "removed": "nothing: it was taken out by `genpipe data remove`",
}


def remedy(reason: str) -> str:
    """What to do about rejects of a reason, "" for one that is unknown here."""
    if reason.startswith("http_"):
        return "correct the URL, or run again later: the server answers with this status"
    return REMEDIES.get(reason, "")
