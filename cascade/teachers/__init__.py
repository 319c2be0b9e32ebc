"""Teachers: asking paid models, never twice for the same thing, never over budget.

`client.TeacherClient` asks one tier; every response goes to the `ledger.Ledger` before anything else happens to it;
`limits` and `budget` hold the requests back; `economics` plans and reports what it costs. `offline` is a teacher for
runs without a key: an OpenAI-compatible server on loopback that replays the tasks' own answer key, and says so.
"""

MOST_CALLS = 20
"""That `sample.buy_sample` makes."""
