"""Texts in other words and letters that say the same, by rule."""

import re


SYNONYMS = """
    good fine, great grand, movie picture, film picture, phone handset, bad poor, love adore, hate detest, happy glad,
    sad unhappy, funny amusing, big large, small little, very quite, really truly, nice pleasant, best finest, fast
    quick, easy simple, difficult hard, buy purchase, bought purchased, use employ, used employed, think believe, like
    enjoy, people folks, story tale, begin start, ends finishes, problem trouble, problems troubles, better superior,
    excellent superb, terrible dreadful, awful horrid, boring tedious, smart clever, stupid foolish, beautiful lovely,
    ugly hideous, always ever, often frequently, also too, but yet, because since, thanks cheers, wrong incorrect,
    right correct, amazing astonishing, wonderful marvellous, work function, works functions, look appear, looks
    appears, get obtain, got obtained, quality standard, image picture, camera device, money cash, day date, just
    merely, about regarding, new recent, now currently, player machine, sound audio, price cost, life existence, damn
    darn, feel sense, makes creates, make create, made created, see notice, play perform, long lengthy, enough
    sufficient, screen display, service assistance, come arrive, need require, pretty rather, want desire, product
    article, find discover, last final, know understand, seems appears, seem appear, hope trust, thing object, things
    objects, real genuine, lot load, take grab, old aged, home house, song tune, full complete, perfect flawless, keep
    retain, sweet charming, city town, found discovered, original initial, end finish, whole entire, finally
    eventually, almost nearly, help aid, night evening, especially particularly, fun amusement, poor inferior, worst
    lousiest, awesome impressive, cool neat, sucks stinks, recommend suggest, hard tough, man fellow, way manner
"""
SYNONYM = dict(pair.split() for pair in SYNONYMS.split(","))


def typing_errors(text: str) -> str:
    """Two letters in the middle of every third word of four letters or more change places."""
    words = 0

    def mistyped(match: re.Match) -> str:
        nonlocal words
        words += 1
        word, middle = match[0], len(match[0]) // 2
        return word if words % 3 else word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]

    return re.sub("[A-Za-z]{4,}", mistyped, text)


def synonyms(text: str) -> str:
    """The words of a list of common ones are others that mean much the same."""

    def other(match: re.Match) -> str:
        synonym = SYNONYM.get(match[0].lower())
        return in_case_of(match[0], synonym) if synonym else match[0]

    return re.sub("[A-Za-z']+", other, text)


def in_case_of(word: str, other: str) -> str:
    """`other`, in capitals or with one, as `word` is."""
    if word.isupper() and len(word) > 1:
        return other.upper()
    return other.capitalize() if word[0].isupper() else other


WORDINGS = {"typing errors": typing_errors, "synonyms": synonyms, "capitals": str.upper}
