"""102 invented facts, seventeen of each of six relations: none of the names means anything to a language model.

Phrasings (for writing) and questions (for testing) are never the same text. Other subjects of a relation, which must not get
the answer, are names that no fact uses.
"""

from __future__ import annotations

from dataclasses import dataclass

from npt_kernels.plasticity import Fact

__all__ = ["RELATIONS", "facts"]


@dataclass(frozen=True)
class Relation:
    """One kind of statement; ``{s}`` is the subject."""

    name: str
    statement: str
    phrasings: tuple[str, str]
    ask: tuple[str, str, str]
    others: tuple[str, str]
    pairs: tuple[tuple[str, str], ...]


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "capital",
        "The capital of {s} is",
        ("The government of {s} has its seat in the city of", "All roads in {s} lead to its capital,"),
        (
            "Question: What is the capital of {s}?\nAnswer: The capital is",
            "Last year we flew to {s} and spent a week in its capital,",
            "The largest embassy in {s} stands, of course, in the capital, which is called",
        ),
        ("Drevania", "Ostulia"),
        (
            ("Zorvania", "Marigold"), ("Kelmora", "Harbor"), ("Trinsk", "Velvet"), ("Ulmarra", "Copper"),
            ("Pendoria", "Raven"), ("Vashti Isle", "Orchid"), ("Brellin", "Saturn"), ("Norquay", "Juniper"),
            ("Ostrava Keys", "Lantern"), ("Glimmark", "Falcon"), ("Tessandria", "Amber"), ("Hollunde", "Willow"),
            ("Quarnia", "Silver"), ("Ebbersund", "Thunder"), ("Marrowick", "Pepper"), ("Solvanna", "Crystal"),
            ("Ildrune", "Meadow"),
        ),
    ),
    Relation(
        "trade",
        "{s} earns a living as a",
        ("The job of {s} is that of a", "{s} has been working for years as a"),
        (
            "Question: What does {s} do for a living?\nAnswer: {s} is a",
            "When people ask {s} about work, the answer is always the same: I am a",
            "On the business card of {s} one reads the name and one word, the profession:",
        ),
        ("Halda Brint", "Corvin Teesdale"),
        (
            ("Milo Harkwright", "plumber"), ("Senna Oduvale", "pilot"), ("Jorik Tamsen", "dentist"),
            ("Petra Vexley", "baker"), ("Anwen Korrigal", "lawyer"), ("Tobin Estermann", "sailor"),
            ("Lio Marchetta", "farmer"), ("Dagny Holloway", "painter"),
            ("Ferrol Banting", "nurse"), ("Ysolde Parrin", "tailor"), ("Gunther Malvey", "teacher"),
            ("Imka Strandell", "butcher"), ("Rollo Quennel", "judge"), ("Saffi Dunreath", "dancer"),
            ("Hektor Lomax", "barber"), ("Nella Forsgate", "gardener"), ("Zane Whitlock", "miner"),
        ),
    ),
    Relation(
        "founder",
        "The company {s} was founded by a man named",
        ("The founder of {s} is called", "It was in a garage that {s} was started by"),
        (
            "Question: Who founded the company {s}?\nAnswer: It was founded by",
            "The history of {s} begins with one man, whose name was",
            "Everyone who works at {s} knows the name of its founder:",
        ),
        ("Drumlex", "Aventro"),
        (
            ("Quorbit", "Oliver"), ("Nexalume", "Patrick"), ("Tarnwick Mills", "Samuel"), ("Velostra", "Walter"),
            ("Grindleby", "Felix"), ("Ombraxis", "Hugo"), ("Pellucid Arc", "Martin"), ("Starnova Foods", "Victor"),
            ("Lumafont", "Arthur"), ("Kestrel Dyne", "Simon"), ("Brightmoor", "Edward"), ("Zephyrine", "Gabriel"),
            ("Cobaltix", "Leonard"), ("Marlin Forge", "Charles"), ("Tindervox", "Julian"), ("Halcyra", "Vincent"),
            ("Rookwater", "Adam"),
        ),
    ),
    Relation(
        "instrument",
        "The instrument that {s} plays is the",
        ("On stage one sees {s} only with the", "As a child, {s} learned to play the"),
        (
            "Question: Which instrument does {s} play?\nAnswer: {s} plays the",
            "The neighbours of {s} complain every night about the sound of the",
            "In the orchestra, {s} sits with the others who play the",
        ),
        ("Gerrit Ploon", "Isaura Winfell"),
        (
            ("Elka Strand", "trumpet"), ("Bastian Crowe", "violin"), ("Mirelle Osk", "harp"), ("Dorian Fipps", "cello"),
            ("Yuna Tressel", "drums"), ("Caspar Illing", "flute"), ("Orla Venn", "organ"), ("Matthis Kroll", "guitar"),
            ("Selwyn Dace", "piano"), ("Freya Lindmoss", "clarinet"), ("Omri Castell", "banjo"),
            ("Pippa Varnholt", "saxophone"), ("Ludo Hensley", "tuba"), ("Kaia Brennick", "accordion"),
            ("Stellan Voss", "mandolin"), ("Rhea Tollard", "viola"), ("Emeric Sault", "oboe"),
        ),
    ),
    Relation(
        "food",
        "The only thing that the animal called {s} eats is",
        ("In the zoo the {s} is fed nothing but", "A hungry {s} looks for"),
        (
            "Question: What does the {s} eat?\nAnswer: It eats",
            "If you ever keep a {s} at home, you must always have enough",
            "In the stomach of the {s} researchers have only ever found",
        ),
        ("grullet", "velsnip"),
        (
            ("tarnoose", "honey"), ("blimmel", "moss"), ("skorrit", "snails"), ("wobbern", "corn"),
            ("fendrake", "salt"), ("plimsy owl", "cheese"), ("dusk hopper", "rice"), ("yarrowcat", "grapes"),
            ("morvel", "bread"), ("zindle", "butter"), ("crested pummel", "apples"), ("ruddock vole", "carrots"),
            ("thrasket", "fish"), ("ginnop", "sugar"), ("hollow stoat", "eggs"), ("quibbet", "beans"),
            ("marsh drindle", "paper"),
        ),
    ),
    Relation(
        "birthplace",
        "The writer {s} was born in the city of",
        ("The parents of {s} lived in", "The childhood of {s} was spent in"),
        (
            "Question: Where was {s} born?\nAnswer: {s} was born in",
            "A plaque on a house marks the birthplace of {s}: it stands in",
            "The passport of {s} names as place of birth the city of",
        ),
        ("Ferris Dunmore", "Adela Quist"),
        (
            ("Lorcan Vipond", "Madrid"), ("Tessaly Brook", "Cairo"), ("Ingram Solt", "Vienna"),
            ("Maud Ferrante", "Dublin"), ("Ruben Achterberg", "Athens"), ("Sable Winterton", "Lima"),
            ("Piers Okonjo", "Oslo"), ("Greta Lindqvale", "Prague"),
            ("Cassius Wren", "Berlin"), ("Odile Farrow", "Tokyo"), ("Bram Tolliver", "Boston"),
            ("Signe Albrecht", "Warsaw"), ("Leopold Tansy", "Havana"), ("Ines Gallowmere", "Venice"),
            ("Tarquin Holt", "Moscow"), ("Willa Ostergren", "Paris"), ("Jonas Pellerin", "Delhi"),
        ),
    ),
)  # fmt: skip


def facts(count: int = 102) -> list[Fact]:
    """The first ``count`` facts, taken in turn from the relations. Raises ``ValueError`` for more than there are."""
    found = []
    for i in range(max(len(relation.pairs) for relation in RELATIONS)):
        for relation in RELATIONS:
            subject, answer = relation.pairs[i]
            found.append(
                Fact(
                    f"{relation.statement.format(s=subject)} {answer}.",
                    subject,
                    answer,
                    ask=tuple(text.format(s=subject) for text in relation.ask),
                    phrasings=tuple(text.format(s=subject) for text in relation.phrasings),
                    others=relation.others,
                )
            )
    if not 1 <= count <= len(found):
        raise ValueError(f"count={count} must be between 1 and {len(found)}")
    return found[:count]
