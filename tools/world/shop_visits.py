"""What people ask a shop before they visit or write to it: hours, place, people, contact.

Each intent holds many wordings of one question, and the short answers that a shop may give. The invented shops of the
pretraining world and the shop of `examples/support.jsonl` are asked in this same language; only their facts differ.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Intent:
    """One thing people ask.

    Attributes:
        asks: templates of the question, for `wording.expand`.
        answers: templates of the answer, for `wording.fill`.
        topics: what the question is about, to be named in any sentence.
    """

    asks: tuple[str, ...]
    answers: tuple[str, ...]
    topics: tuple[str, ...]


VISITS: dict[str, Intent] = {
    "opening": Intent(
        ("When do you open[| in the morning| on weekdays]?",
         "[What time|At what time] [do you|does the shop] open[| in the morning]?",
         "How early [are you open|can I come in|do you open]?",
         "When does the shop open[| on weekdays| in the morning]?",
         "[Can|Could] you tell me when you open[| in the morning]?", "What is your opening time[| on weekdays]?",
         "From what time are you open[| on weekdays]?", "How early in the morning can I [visit|come to] the shop?",
         "What is the earliest [I can come|time I can visit you]?", "When are [your|the] doors open in the morning?",
         "Please tell me your opening time.", "[When|At what time] do the doors open?"),
        ("We open at {morning} on weekdays.", "The shop opens at {morning} on weekdays.",
         "Our doors open at {morning}."),
        ("your opening time", "the time you open in the morning", "when you open"),
    ),
    "closing": Intent(
        ("When do you close[| in the evening| on weekdays]?",
         "[What time|At what time] [do you|does the shop] close[| in the evening]?",
         "How late [are you open|can I come in|do you stay open]?",
         "When does the shop close[| on weekdays| in the evening]?",
         "[Can|Could] you tell me when you close[| in the evening]?", "What is your closing time[| on weekdays]?",
         "Until what time are you open[| on weekdays]?", "How late in the evening can I [visit|come to] the shop?",
         "What is the latest [I can come|time I can visit you]?", "When are [your|the] doors closed in the evening?",
         "Please tell me your closing time.", "[When|At what time] do the doors close?"),
        ("We close at {evening} on weekdays.", "The shop closes at {evening} on weekdays.",
         "Our doors close at {evening}."),
        ("your closing time", "the time you close in the evening", "when you close"),
    ),
    "saturday": Intent(
        ("[When|What hours] are you open on [Saturday|Saturdays]?",
         "What are your [Saturday hours|hours on Saturday|hours on a Saturday]?",
         "Are you open on [Saturday|Saturdays], and when?", "Can I [visit|come|come in] on [Saturday|a Saturday]?",
         "Is the shop open on [Saturday|Saturdays]?", "[How long|Until when] are you open on [Saturday|a Saturday]?",
         "I want to [come|visit] on Saturday, when are you there?",
         "What are the opening times on [Saturday|a Saturday]?", "Please tell me your hours on [Saturday|Saturdays]."),
        ("On Saturdays we are open from {morning} to {evening}.", "Our Saturday hours are {morning} to {evening}."),
        ("Saturday", "your hours on Saturday", "coming on a Saturday"),
    ),
    "sunday": Intent(
        ("[When|What hours] are you open on [Sunday|Sundays]?",
         "What are your [Sunday hours|hours on Sunday|hours on a Sunday]?",
         "Are you open on [Sunday|Sundays], and when?", "Can I [visit|come|come in] on [Sunday|a Sunday]?",
         "Is the shop open on [Sunday|Sundays]?", "[How long|Until when] are you open on [Sunday|a Sunday]?",
         "I want to [come|visit] on Sunday, when are you there?", "What are the opening times on [Sunday|a Sunday]?",
         "Please tell me your hours on [Sunday|Sundays]."),
        ("On Sundays we open for {few} hours, from {clock} pm.", "On Sundays only our stand at {place} is open."),
        ("Sunday", "your hours on Sunday", "coming on a Sunday"),
    ),
    "lunch": Intent(
        ("[When|At what time] is your lunch break?", "Do you close [for lunch|at lunch time|over lunch]?",
         "[Can|Could] I come [at noon|at lunch time|during lunch]?",
         "[Are you open|Is the shop open] [at noon|at lunch time|during lunch]?",
         "When do you [take|have] your lunch break?", "Is there a lunch break[|, and when]?",
         "Are you closed [at noon|at lunch time|during lunch]?", "How long is [your|the] lunch break?",
         "Is the shop closed [at noon|over lunch]?", "Do you have a break at noon?"),
        ("We close for lunch from {noon} to {afternoon}.", "Our lunch break is from {noon} to {afternoon}."),
        ("your lunch break", "lunch time", "the break at noon"),
    ),
    "address": Intent(
        ("Where [is your shop|are you|are you located]?",
         "What is [your address|the address|the address of your shop]?",
         "Where can I [find you|find your shop|find the shop]?", "[Which|What] street [are you on|is the shop in]?",
         "[Can|Could] you [give|tell] me your address[| please]?", "How do I find [your shop|the shop]?",
         "Where do I have to go to [visit you|see your shop]?",
         "Please tell me [your address|where you are|where I find you].",
         "What is the street [of your shop|that you are on]?"),
        ("Our shop is at {house} {street}.", "You find us at {house} {street}.", "We are at {house} {street}."),
        ("your address", "the street of the shop", "where your shop is"),
    ),
    "parking": Intent(
        ("Where can I [park|park my car|leave my car]?", "Do you have [parking|a car park|parking spaces]?",
         "Is there [parking|a car park|a place to park] [near you|near the shop|nearby]?",
         "I am coming by car, where [do I|can I] park?", "Where is [the car park|your car park|the nearest car park]?",
         "Can I park [at|near] your shop?", "Where should I put my car?", "Where do [people|most customers] park?",
         "Is there [room|a space] for [my|our] car?", "Where do I leave the car when I visit the shop?"),
        ("You can park {where} {place}.", "Our car park is {where} {place}.", "Please park {where} {place}."),
        ("parking", "a place for my car", "the car park"),
    ),
    "bus": Intent(
        ("Which bus [goes|comes|takes me] to [your shop|you|the shop]?", "How do I [get|come] to you by bus?",
         "What bus [do I|should I|can I] take?", "Which bus stop is [near you|near the shop|the nearest]?",
         "Can I [come|get there|reach you] by bus?", "[Where|At which stop] do I get off the bus?",
         "How can I reach [you|the shop] [without a car|by public transport]?",
         "Which bus do I [have to take|take to the shop]?", "How do I get to the shop by bus?"),
        ("Take bus {bus} to {stop}.", "Bus {bus} stops near us, at {stop}.",
         "Please take bus {bus} and get off at {stop}."),
        ("the bus to your shop", "bus stops near you", "coming by bus"),
    ),
    "entrance": Intent(
        ("Is [your shop|the shop] [easy to enter|open] with a wheelchair?",
         "Can I [come in|enter] with a [wheelchair|pram]?", "Where is the [step-free|wheelchair] entrance?",
         "Is there an entrance without [steps|stairs]?", "I use a wheelchair, how do I get in?",
         "How do I get in with a [pram|wheelchair]?", "Do you have a step-free [entrance|way in]?"),
        ("The step-free entrance is at {spot}.", "Please use the ramp at {spot}.", "There are no steps at {spot}."),
        ("the entrance with a wheelchair", "coming in with a pram"),
    ),
    "phone": Intent(
        ("What is your [phone|telephone] number?", "[Can|Could] I [call|phone|ring] you?",
         "[Which|What] number [do I|can I|should I] call?", "How can I reach you by [phone|telephone]?",
         "Do you have a [phone|telephone] number?", "I would [like|prefer] to call you, what is the number?",
         "[Can|Could] you give me your phone number[| please]?", "How do I [call|phone|ring] [the shop|you]?",
         "Please tell me [the number|the phone number].", "Which number can I [ring|phone]?"),
        ("Our phone number is {phone}.", "You can call us on {phone}.", "Please ring {phone}."),
        ("your phone number", "calling you", "a number that I can ring"),
    ),
    "email": Intent(
        ("What is your email[| address]?", "[Can|Could] I [email you|write you an email|send you an email]?",
         "[Which|What] email address [do I|can I|should I] use?", "How can I reach you by email?",
         "Do you have an email address?", "Where [do I|can I] send [an email|my email]?",
         "[Can|Could] you give me your email address[| please]?",
         "I would [like|prefer] to write, what is your email?", "Please tell me [your email|the email address].",
         "To [what|which] address do I write?", "Where do I write an email to?"),
        ("Our email address is {mailbox}@{site}.example.", "You can write to {mailbox}@{site}.example."),
        ("your email address", "writing you an email"),
    ),
    "reply": Intent(
        ("How [fast|soon|quickly] do you [answer|reply to] emails?",
         "When [will I|do I] get [an answer|a reply] to my email?",
         "How long [do you need|does it take] to [answer|reply to] an email?",
         "I wrote you an email, when [will you answer|do you reply|will you reply]?",
         "How long do I wait for [an answer|a reply]?", "How long until you [answer|reply to] my [email|message]?",
         "How [fast|soon] will [I get a reply|you answer me|I hear from you]?", "When do you [reply|write back]?"),
        ("We answer emails within {count} hours.", "You get a reply within {count} hours.",
         "An answer takes us about {count} hours."),
        ("the answer to my email", "how long you need to answer", "your reply to my message"),
    ),
    "owner": Intent(
        ("Who [owns|runs] [the shop|your shop|this shop]?", "Who is [the owner|the boss|your boss]?",
         "What is the [name of the owner|owner's name|owner called]?", "Who does [the shop|this shop] belong to?",
         "Whose shop is this?", "[Can|Could] you tell me who [owns|runs] the shop?",
         "Who is [behind|in charge of] [the shop|your shop]?", "Which person [owns|runs] the shop?",
         "What is your boss called?", "Who is the person that runs the shop?"),
        ("The shop belongs to {name} {surname}.", "Our owner is {name} {surname}.",
         "The shop is run by {name} {surname}."),
        ("the owner of the shop", "your boss", "the person that owns the shop"),
    ),
    "founded": Intent(
        ("[When|In which year|In what year] was [the shop|your shop] [founded|started]?",
         "How old is [the shop|your shop|this shop]?", "[When|In which year] did you [start|begin|first open]?",
         "Since when [do you exist|does the shop exist|have you been here]?",
         "How long [have you|has the shop] [been around|existed]?",
         "What year did [the shop|your shop] [start|begin]?",
         "For how long [have you been|has the shop been] [here|around]?", "When was [the|this] shop started?",
         "How many years old is [the|this] shop?"),
        ("The shop was founded in {year}.", "We have been here since {year}.", "We started in {year}."),
        ("the age of your shop", "the year you started", "how old the shop is"),
    ),
    "staff": Intent(
        ("How many people work [for you|at your shop|in the shop|there]?", "How [big|large] is your team?",
         "How many [workers|employees|people] do you have?", "What is the size of your team?",
         "How many of you are there?", "How many people are [on|in] your team?", "Are you a [big|small] team?",
         "How many [people|men and women] are working [for you|there]?",
         "What is the number of [workers|people] at your shop?"),
        ("There are {count} people in our team.", "We are a team of {count} people.", "We are {count} people."),
        ("the size of your team", "the people that work for you", "the number of your workers"),
    ),
    "languages": Intent(
        ("[What|Which] languages do you speak?", "[What|Which] languages [does your team|do your people] speak?",
         "In [what|which] languages can [I ask|you help me]?", "Do you speak [other languages|any other language]?",
         "Can I talk to you in [another|my own] language?", "Do you only speak English?",
         "My English is bad, what else do you speak?", "Which languages [can I|can you] use?",
         "In which languages could you answer me?"),
        ("We speak {language}, {language2} and {language3}.", "Our team speaks {language} and {language2}."),
        ("the languages you speak", "other languages than English"),
    ),
    "workshop": Intent(
        ("When [are|do you hold] your [workshops|courses]?", "[Which|What] day is the [workshop|course]?",
         "Do you [give|offer|have] [workshops|courses], and when?",
         "When can I [join|come to|take part in] a [workshop|course]?", "When is the next [workshop|course]?",
         "On [which|what] day do you [teach|give workshops|give courses]?",
         "I would like to [join|come to] a workshop, when is it?", "[What|Which] day do you have [courses|a course]?"),
        ("Our workshop is on {day} at {evening}.", "The workshop takes place every {day} at {evening}."),
        ("your workshops", "your courses", "the day of the workshop"),
    ),
    "dogs": Intent(
        ("[Can|May] I bring [my dog|a dog|my dogs]?", "Are [dogs|pets|animals] [allowed|welcome]?",
         "[What about|Is there a rule for] [dogs|pets]?", "Is [my dog|a dog] [allowed|welcome] in the shop?",
         "I have a dog, can it come [in|with me|along]?", "Where can [I leave my dog|my dog wait]?",
         "Do you allow [dogs|pets|animals]?", "Is it [allowed|fine] to come with [a dog|my dog]?",
         "May I come with my dog?"),
        ("Dogs are welcome, there is water at {spot}.", "Your dog can wait at {spot}.", "Dogs are welcome at {spot}."),
        ("dogs in the shop", "my dog", "bringing a dog"),
    ),
    "cafe": Intent(
        ("Can I [drink something|have a drink|get a drink] [in the shop|at your shop|there]?",
         "Do you have a [cafe|coffee corner]?", "What [can I drink|do you serve|drinks do you serve] in the cafe?",
         "Is there [a cafe|something to drink] in the shop?", "What is there to drink?",
         "[What|Which] drinks do you [have|offer]?", "Where can I get [a coffee|a tea] [in|at] the shop?"),
        ("Our cafe serves {drink} and {drink2}.", "We serve {drink} and {drink2}.",
         "There is {drink} for {few} euros."),
        ("your cafe", "something to drink", "the drinks in your cafe"),
    ),
    "job": Intent(
        ("[Can|Could] I work [for you|at your shop|with you]?", "Do you have [a job|jobs|work] for me?",
         "How [do I|can I] apply for a job?", "Who do I [write to|ask] [about|for] a job?",
         "I am looking for [work|a job], who do I ask?", "Are you looking for [people|staff|help]?",
         "Where do I send my application?", "I would like [a job|to work for you], who do I ask?",
         "How can I get [work|a job] [from you|with you]?", "Is there work for me at the shop?"),
        ("Please send your application to {name} {surname}.", "Please ask {name} {surname} about jobs."),
        ("a job at your shop", "working for you", "my application"),
    ),
}  # fmt: skip
