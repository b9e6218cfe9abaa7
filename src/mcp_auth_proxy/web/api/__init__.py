"""The API: everything that the commands can do, as JSON over HTTP at ``/api/v1``.

To add an endpoint, take a module of the resource (``grants.py`` is an example), and

1. describe the body, the query and the answer as msgspec models: ``models.Body`` for what comes in (unknown fields are
   refused), ``models.View`` for what goes out. If msgspec has no constraint for a field, give it a ``models.Check``: a
   function that raises ValueError::

       class NewNote(Body):
           text: Text
           link: Annotated[str, Check(values.url)] | None = None

2. write the handler. What it gets is valid, and its caller may use the endpoint; whatever else is wrong it raises as a
   ``problems.Problem``, or lets an error of ``errors.py`` through::

       async def create_note(call: Call[NewNote, None]) -> Answer:
           note = await Notes(call.api.database).add(call.caller.principal.id, call.body.text)
           call.target = note.id
           return Answer(note_view(note), status=201)

3. add it to ``OPERATIONS`` of that module, and the module to ``application.operations()``. That is the route and the
   entry in the OpenAPI document in one; every call but a GET leaves an audit event ``notes.create``::

       Operation(
           "POST", "/notes", create_note, action="notes.create", access=Access.SELF, summary="Write a note",
           body=NewNote, answers={201: NoteView}, problems=(409,),
       )

4. test it over a socket with ``web.api.api_setup.api_setup``, which runs the proxy and gives a client for each caller.

A list takes ``pages.PageQuery`` (or a subclass with its filters) as its query, and answers ``{items, page}``:
``pages.position(call)`` is where the last page ended, ``pages.info(call, next_position)`` makes the token of the next.
A resource that can be changed is answered with ``Answer(view, etag=True)``, and ``call.check_match(view)`` (412) comes
before the change. ``limits`` has the limits on calls; an operation that starts a flow says ``starts_flow=True``.
"""
