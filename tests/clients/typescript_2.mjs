// The official TypeScript client 2.x.

import { Client, StreamableHTTPClientTransport } from '@modelcontextprotocol/client';
import { action, asked, capabilities, era, run, say, url } from './program.mjs';

const mode = era === 'legacy' || era === 'auto' ? era : { pin: era };
const client = new Client(
  { name: 'typescript-2', version: '1' },
  {
    capabilities,
    versionNegotiation: { mode },
    listChanged: { tools: { autoRefresh: false, debounceMs: 0, onChanged: () => say({ event: 'changed' }) } },
  },
);
if (action !== 'none') {
  client.setRequestHandler('elicitation/create', asked);
  client.setNotificationHandler('notifications/elicitation/complete', ({ params }) =>
    say({ event: 'complete', id: params.elicitationId }),
  );
}
await run(client, () => client.connect(new StreamableHTTPClientTransport(new URL(url))));
