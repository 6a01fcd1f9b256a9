"""Apt is asked for what is set up here, and packages that are missing are named."""

from lab.host.debian import main_archive_uris

INDEX_TARGETS = """\
MetaKey: main/binary-amd64/Packages
Codename: bookworm-security
Label: Debian-Security
Origin: Debian
Repo-URI: http://mirror.example/debian-security/

MetaKey: main/binary-amd64/Packages
Codename: bookworm
Label: Debian
Origin: Debian
Repo-URI: http://mirror.example/debian/

MetaKey: main/binary-amd64/Packages
Codename: bookworm-updates
Label: Debian
Origin: Debian
Repo-URI: http://mirror.example/debian/

MetaKey: stable/binary-amd64/Packages
Label: Something
Origin: Somebody
Repo-URI: https://other.example/apt/
"""


def test_the_main_archive_is_found_among_the_configured_ones() -> None:
    assert main_archive_uris(INDEX_TARGETS) == ["http://mirror.example/debian/"]


def test_before_the_first_update_apt_cannot_tell_archives_apart() -> None:
    text = "Repo-URI: http://a.example/debian-security/\n\nRepo-URI: http://a.example/debian/\n"

    assert main_archive_uris(text) == ["http://a.example/debian/"]


def test_an_archive_of_another_distribution_has_nothing_for_us() -> None:
    assert main_archive_uris("Origin: Ubuntu\nLabel: Ubuntu\nRepo-URI: http://u.example/\n") == []
    assert main_archive_uris("") == []
