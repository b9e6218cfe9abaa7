"""Whether a file that was found, and not named by the user, can be trusted: nobody else may have put it there."""

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

_MAX_LINKS = 40
"""Symbolic links that are followed, as by Linux."""


def reason_to_distrust(path: Path) -> str | None:
    """Return why a file can't be trusted; None if only this user and root can write it or replace it.

    The file, its folder, and both for the target of a symbolic link are looked at, but not the folders above.
    """
    try:
        for place, found in _places(path):
            if problem := _problem(found):
                return f"{place} {problem}"
    except OSError as error:
        return f"{error.filename or path} can't be checked ({error.strerror})"
    return None


def _places(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for _ in range(_MAX_LINKS):
        yield path.parent, path.parent.stat()
        found = path.lstat()
        yield path, found
        if not stat.S_ISLNK(found.st_mode):
            return
        path = path.parent / path.readlink()
    raise OSError(0, "too many symbolic links", str(path))


def _problem(found: os.stat_result) -> str | None:
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to the user {_name_of_user(found.st_uid)}"
    if stat.S_ISLNK(found.st_mode):
        # The mode of a link means nothing.
        return None
    if found.st_mode & stat.S_IWOTH:
        return "can be written by everyone"
    if found.st_mode & stat.S_IWGRP and not _is_private(found.st_gid):
        return f"can be written by the group {_name_of_group(found.st_gid)}"
    return None


def _is_private(gid: int) -> bool:
    """Return whether a group is this user's own: it has the user's name, and nobody else in it."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    if user.pw_gid != gid or user.pw_name != group.gr_name or set(group.gr_mem) - {user.pw_name}:
        return False
    # Those who have it as their first group need not be listed as its members.
    return all(other.pw_gid != gid or other.pw_uid == user.pw_uid for other in pwd.getpwall())


def _name_of_user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _name_of_group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
