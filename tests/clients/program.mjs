// What the client programs have in common: a command on each line of standard input, an event on each line of standard
// output. Arguments: URL of the server, era (legacy, auto or a revision), what the user does if asked (none: can't be
// asked).

import { createInterface } from 'node:readline';

export const [url, era, action] = process.argv.slice(2);

export const capabilities = action === 'none' ? {} : { elicitation: { url: {} } };

export function say(event) {
  console.log(JSON.stringify(event));
}

/** Answer a request of the server to show a link to the user. */
export function asked({ params }) {
  say({ event: 'asked', url: params.url });
  return { action };
}

export async function run(client, connect) {
  try {
    await connect();
  } catch (error) {
    say({ event: 'failed', text: String(error) });
    process.exit(1);
  }
  say({
    event: 'connected',
    instructions: client.getInstructions(),
    revision: client.getNegotiatedProtocolVersion?.(),
  });
  for await (const line of createInterface({ input: process.stdin })) {
    const { tool, arguments: args } = JSON.parse(line);
    // Not awaited: clients do several things at once.
    (tool === undefined ? list(client) : call(client, tool, args)).catch((error) =>
      say({ event: 'error', text: String(error), code: error.code, data: error.data }),
    );
  }
  await client.close();
  process.exit(0);
}

async function list(client) {
  const { tools } = await client.listTools();
  say({ event: 'tools', names: tools.map((tool) => tool.name), text: tools.map((tool) => tool.description).join(' ') });
}

async function call(client, name, args) {
  const { content, isError } = await client.callTool({ name, arguments: args });
  say({ event: 'result', text: content.map((part) => part.text).join(''), isError: isError === true });
}
