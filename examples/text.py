"""A text of our own for the demonstration: about 400 tokens of plain English."""

LIGHTHOUSE = """\
The lighthouse at the end of the northern pier was built in 1871, after the third winter in a \
row in which ships bound for the harbour had run aground on the sandbank. Its first keeper, a \
retired carpenter, lived in two small rooms below the lamp and kept a diary in which he noted \
the weather, the ships that passed, and the number of candles he had burned. The diary is now in \
the town museum. Most of its entries are short. On a day in March he wrote that the wind had \
turned to the east and that nothing had passed; on the day after, that nothing had passed again.

The lamp itself was a simple thing. Twelve oil burners stood in a ring, and behind each of them \
a polished copper mirror threw the light out to sea. Every two hours the keeper climbed the \
stairs, trimmed the wicks, filled the burners, and wiped the soot from the mirrors with a soft \
cloth. When fog came in, he rang a bell once a minute for as long as the fog lasted, which in \
autumn could be a day and a night. His wife, who is mentioned in the diary only twice, rang it \
when he slept.

In 1904 the oil burners were replaced by gas, and in 1931 by electricity, and with each change \
the work of the keeper became lighter. The last keeper left in 1968. By then the lamp was \
switched on and off by a clock, the bell had been replaced by a horn, and the sandbank had been \
dredged so often that it no longer appeared on the charts. The town thought for a while of \
pulling the tower down. What saved it was the view: from the gallery one can see the whole bay, \
the two islands, and on a clear day the hills behind the old quarry. Today the rooms below the \
lamp are a small café, and the stairs that the keeper climbed twelve times a day are climbed by \
visitors, who usually stop halfway to rest.
"""

REVIEW = """\
I did not expect to like this film, and for the first half hour I was right. The story is not \
new, the two brothers are not believable, and nobody in the whole village ever seems to work. But \
it would not be fair to stop there. The second half is nothing like the first. Without raising \
its voice, it shows a family that has never learned to speak about what happened, and no scene is \
longer than it has to be. There is no music for almost an hour. When it comes back it is not sad, \
and that is what makes it hard to bear. I cannot say that everything works: the priest is neither \
funny nor wise, and the last five minutes explain what needed no explanation. Still, none of my \
friends left before the end, and not one of them talked on the way home. It is not a film for \
every evening. It is not a film I would have missed, either.
"""
