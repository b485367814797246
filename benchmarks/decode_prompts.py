"""Prompts of six kinds for `benchmarks.decode`; all texts were written for this project."""

_MILL = (
    "The old mill stands at the bend of the river, where the water slows before it falls over the"
    " weir. In spring the miller opens the three gates one after another, and the great wheel"
    " begins to turn. The stones grind rye on Mondays, wheat on Tuesdays, and nothing at all on"
    " Sundays, when the miller's daughter sells bread at the market in the next village."
)
_BRIDGE = (
    "The bridge over the northern canal was closed on Tuesday after an inspection found cracks in"
    " two of its steel beams. The city engineer, Maria Holm, said that the beams had been replaced"
    " only nine years ago and that the cause was not yet known. Buses will use the railway bridge"
    " for the next four weeks. Cyclists and people on foot may still cross in the daytime. Shops on"
    " the south bank fear that they will lose customers, and the council has promised to pay part"
    " of their rent until the bridge opens again."
)
_BEES = (
    "Honeybees tell each other where food is by dancing. A bee that has found flowers near the hive"
    " runs in a circle. If the flowers are farther away, she runs in a straight line while shaking"
    " her body, turns back, and runs the line again. The angle of the line to the vertical is the"
    " angle between the flowers and the sun, and the longer she shakes, the farther the flight."
    " Other bees follow her closely in the dark, and then leave to search for the place themselves."
)
_MINUTES = (
    "Present: Anna, Bo, Carla and Dinesh. Anna reported that the new server was installed on Monday"
    " and that the old one will be switched off at the end of the month. Bo asked who would move"
    " the mail archive. Carla offered to do it in the second week of May, if Dinesh writes the"
    " script. Dinesh agreed. The group decided to buy two more disks. The next meeting is on the"
    " fourth of June at ten o'clock in the small room."
)
_LIST = (
    "apples 12, pears 7, plums 31, cherries 140, quinces 3, walnuts 58, hazelnuts 77, figs 9,"
    " grapes 210, melons 4, peaches 16, apricots 22"
)
_ADDRESSES = (
    "Ada Brook, 14 Harbour Street, Ostholm, 555-0142\nBen Carver, 3 Mill Lane, Westford, 555-0178\n"
    "Cleo Dunn, 88 Station Road, Ostholm, 555-0113\nDan Ellery, 21 Chapel Hill, Norwick, 555-0199"
)
_MEAN = """def mean(values):
    total = 0
    count = 0
    for value in values:
        total = total + value
        count = count + 1
    return total / count"""
_STACK = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        return self.items.pop()

    def size(self):
        return len(self.items)"""
_SEARCH = """def find(values, target):
    low = 0
    high = len(values) - 1
    while low <= high:
        middle = (low + high) // 2
        if values[middle] == target:
            return middle
        if values[middle] < target:
            low = middle + 1
        else:
            high = middle - 1
    return -1"""
_CSV = """import csv

def read_rows(path):
    rows = []
    with open(path) as file:
        reader = csv.reader(file)
        for row in reader:
            rows.append(row)
    return rows"""

PROMPTS: dict[str, tuple[str, ...]] = {
    "copy": (
        f"Repeat the following text word for word:\n\n{_MILL}",
        f"Repeat the following text word for word:\n\n{_BEES}",
        f"Repeat the following text word for word:\n\n{_MINUTES}",
        f"Copy this list exactly:\n\n{_LIST}",
    ),
    "code": (
        f"Rename the variable `values` to `numbers` in this function:\n\n```python\n{_MEAN}\n```",
        f"Add a method `is_empty` to this class and show it whole:\n\n```python\n{_STACK}\n```",
        f"Add a docstring to this function and show it:\n\n```python\n{_SEARCH}\n```",
        f"Show this program again with type annotations:\n\n```python\n{_CSV}\n```",
    ),
    "summary": (
        f"Summarize this report in three sentences:\n\n{_BRIDGE}",
        f"Summarize what this text says about bees:\n\n{_BEES}",
        f"List the decisions and tasks in these minutes:\n\n{_MINUTES}",
        f"Summarize the following text:\n\n{_MILL}",
    ),
    "writing": (
        "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
        "Write a letter to a neighbour, asking for help with a broken fence.",
        "Write a poem about the first snow in a large city.",
        "Describe a market in the early morning.",
    ),
    "questions": (
        "Why is the sky blue during the day and red in the evening?",
        "How does a refrigerator keep food cold?",
        "What is the difference between a virus and a bacterium?",
        "Who invented the printing press, and why was it important?",
    ),
    "tasks": (
        "Give five tips for someone who wants to learn to play the guitar.",
        "Make a shopping list for a vegetable soup for four people.",
        f"Which of these people live in Ostholm?\n\n{_ADDRESSES}",
        "Plan a day in the mountains with two small children.",
    ),
}
